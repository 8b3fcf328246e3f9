"""Benchmarks in their published formats: what is read, asked and refused, and metrics against values by hand."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from tests.makers import VISION, language_config, save_images, shape_tokenizer, sharpened_vlm
from vlmamba import cli
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, GenerationConfig, VLMConfig
from vlmamba.train.errors import BrokenDataError
from vlmamba.train.evaluation_metrics import (
    Box,
    intersection_over_union,
    normalized_answer,
    parse_box,
    vqa_accuracy,
)
from vlmamba.train.evaluation_sets import RefCOCO, read_benchmark, read_refcoco, read_vizwiz, read_vsr
from vlmamba.train.parquet import ParquetTable
from vlmamba.train.sources import read_image


@pytest.fixture(scope="module")
def vlm() -> VLM:
    config = VLMConfig(language_config("mamba2"), (VISION,), ConnectorConfig("mlp"), template="qa")
    return sharpened_vlm(config, shape_tokenizer())


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    save_images(tmp_path / "images", ("red", "blue"))
    return tmp_path / "images"


def answers(*texts: str) -> list[dict]:
    """Ten answers as VizWiz has them: the texts, and others that agree with nothing."""
    texts = (*texts, *(f"other {i}" for i in range(10 - len(texts))))
    return [{"answer": text, "answer_confidence": "yes"} for text in texts]


def vizwiz_item(**changes) -> dict:
    item = {"image": "red.png", "question": "What is this?", "answers": answers("red"), "answer_type": "other",
            "answerable": 1}  # fmt: skip
    return item | changes


def vsr_item(**changes) -> dict:
    return {"image": "red.png", "image_link": "http://images.cocodataset.org/train2017/red.png", "label": 1,
            "caption": "The cat is on the bed.", "relation": "on", "subj": "cat", "obj": "bed"} | changes  # fmt: skip


def write_refcoco(folder: Path, refs: object = None, instances: object = None) -> Path:
    """RefCOCO's two files: two things in red.png of 40 x 30 pixels, and one of the training split."""
    if refs is None:
        refs = [
            {"ref_id": i, "ann_id": 10 + i, "image_id": 7, "file_name": f"red_{i}.png", "split": split,
             "sentences": [{"sent_id": 2 * i + j, "sent": sent, "raw": sent.upper()} for j, sent in enumerate(sents)]}
            for i, (split, sents) in enumerate([("val", ["left one", "café"]), ("val", ["right"]), ("train", ["none"])])
        ]  # fmt: skip
    if instances is None:
        instances = {
            "images": [{"id": 7, "file_name": "red.png", "width": 40, "height": 30}],
            "annotations": [{"id": 10 + i, "image_id": 7, "bbox": box} for i, box in
                            enumerate([[4, 3, 16, 15], [20.13, 0, 20.0, 30.4], [0, 0, 1, 1]])],
        }  # fmt: skip
    # As Python 2 wrote them.
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder / "refs(unc).p"


# Metrics.


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_by_hand(agreeing, accuracy):
    truths = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("Red.", truths) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("", ""),
        ("  The Cat.\n", "cat"),
        ("Unanswerable.", "unanswerable"),
        ("an apple, a pear", "apple pear"),
        ("two", "2"),
        ("none", "0"),
        ("3.5 grams.", "3.5 grams"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("coca-cola", "coca cola"),
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("its", "its"),
        ("we were", "we were"),
    ],
)
def test_answers_are_compared_in_a_normal_form(text, normal):
    assert normalized_answer(text) == normal
    assert normalized_answer(normal) == normal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "0.1, 0.2, 0.3, 0.4",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1, 0.2, 0.3, 0.4",
        "[0.1, 0.2, 0.3, 0.4] [0.1, 0.2, 0.3, 0.4]",
        "It is at [0.1, 0.2, 0.3, 0.4].",
        "[0.1 0.2 0.3 0.4]",
        "[0.3, 0.2, 0.1, 0.4]",
        "[0.1, 0.4, 0.3, 0.4]",
        "[-0.1, 0.2, 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 1.01]",
        "[10, 20, 30, 40]",
        "[0.1, 0.2, nan, 0.4]",
        "[0.1, 0.2, 1e999, 0.4]",
        "[0.1, 0.2, 0.3, x]",
        "[٠, 0, 1, 1]",
    ],
)
def test_other_texts_are_no_box(text):
    assert parse_box(text) is None


def test_boxes_by_hand():
    assert parse_box(" [0.1, .25,0.5 , 1]\n") == Box(0.1, 0.25, 0.5, 1)
    assert parse_box("[0, 0, 1, 1e0]") == Box(0, 0, 1, 1)
    whole, left, upper = Box(0, 0, 1, 1), Box(0, 0, 0.5, 1), Box(0, 0, 1, 0.25)
    assert intersection_over_union(whole, whole) == 1
    assert intersection_over_union(whole, left) == intersection_over_union(left, whole) == 0.5
    assert intersection_over_union(left, upper) == pytest.approx(0.125 / 0.625)
    assert intersection_over_union(left, Box(0.5, 0, 1, 1)) == intersection_over_union(left, Box(0.6, 0, 1, 1)) == 0
    # The lower of two equal halves is at 0.5 exactly, which counts.
    truths = (whole, whole, left, left)
    scores = RefCOCO((), truths).scores(["[0, 0.5, 1, 1]", "[0, 0, 0.49, 1]", "[0.5, 0, 1, 1]", "everywhere"])
    assert scores == pytest.approx({"accuracy": 0.25, "mean IoU": (0.5 + 0.49) / 4, "no box": 0.25})


# Files.


def test_vizwiz(images, tmp_path):
    items = [
        vizwiz_item(answers=answers("red", "Red", "red")),
        vizwiz_item(image="blue.png", question="Is it?", answers=answers(*["unanswerable"] * 9), answerable=0),
    ]
    (tmp_path / "val.json").write_text(json.dumps(items))
    found = read_vizwiz(tmp_path / "val.json", images)
    assert [r.turns[0].text for r in found.records] == [
        f"{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
        for question in ("What is this?", "Is it?")
    ]
    assert [r.images for r in found.records] == [(images / "red.png",), (images / "blue.png",)]
    assert found.scores(["red", "Unanswerable"]) == pytest.approx({"accuracy": 0.95, "answerable": 0.9,
                                                                   "unanswerable": 1})  # fmt: skip
    assert found.scores(["unanswerable", ""]) == {"accuracy": 0, "answerable": 0, "unanswerable": 0}
    (tmp_path / "val.json").write_text(json.dumps(items[:1]))
    assert set(read_vizwiz(tmp_path / "val.json", images).scores(["red"])) == {"accuracy", "answerable"}


def test_vsr(images, tmp_path):
    items = [vsr_item(), vsr_item(label=0), vsr_item(label=0, image="blue.png")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    found = read_vsr(tmp_path / "test.jsonl", images)
    assert found.records[0].turns[0].text == (
        'Based on the image, is this statement "True" or "False"? The cat is on the bed.\n'
        'Respond with "True" or "False" directly.'
    )
    assert found.scores(["True", "True", "False"]) == pytest.approx({"accuracy": 2 / 3, 'always "True"': 1 / 3})


def test_refcoco(images, tmp_path):
    found = read_refcoco(write_refcoco(tmp_path), images)
    assert [r.turns[0].text.partition(": ")[2] for r in found.records] == ['"left one"', '"café"', '"right"']
    assert (
        found.records[0]
        .turns[0]
        .text.startswith("Please provide the bounding box coordinate of the region this sentence describes: ")
    )
    # The second one leaves the image by a fraction of a pixel.
    left, right = Box(0.1, 0.1, 0.5, 0.6), Box(0.5, 0, 1, 1)
    assert found.truths == (left, left, right)
    assert len(read_refcoco(tmp_path / "refs(unc).p", images, "train").records) == 1
    with pytest.raises(BrokenDataError, match=r"has no split 'testA', but train, val"):
        read_refcoco(tmp_path / "refs(unc).p", images, "testA")


def test_texts_of_python_2_are_read(images, tmp_path):
    path = write_refcoco(tmp_path)
    path.write_bytes(
        b"(lp0\n(dp1\nS'split'\nS'val'\nsS'ann_id'\nI10\nsS'image_id'\nL7L\nsS'sentences'\n"
        b"(lp2\n(dp3\nS'sent'\nS'caf\xc3\xa9'\nsasa."
    )
    assert read_refcoco(path, images).records[0].turns[0].text.endswith('describes: "café"')


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("vizwiz", vizwiz_item(answers=None), "no `answers`; those of VizWiz's test split are not published"),
        ("vizwiz", vizwiz_item(answers=answers("a")[:9]), "`answers` must be a list of ten"),
        ("vizwiz", vizwiz_item(answers=["a"] * 10), "each of `answers` must have a text `answer`"),
        ("vizwiz", vizwiz_item(answerable="yes"), "`answerable` must be 0 or 1, got 'yes'"),
        ("vizwiz", vizwiz_item(question=" "), "`question` must be a text, got ' '"),
        ("vizwiz", vizwiz_item(image="green.png"), "no image green.png in "),
        ("vizwiz", ["a"], "it must be an object, got \\['a'\\]"),
        ("vsr", vsr_item(label=2), "`label` must be 0 or 1, got 2"),
        ("vsr", vsr_item(caption=None), "`caption` must be a text, got None"),
        ("vsr", vsr_item(image="green.png"), "no image green.png in "),
    ],
)
def test_a_broken_record_is_named(name, item, message, images, tmp_path):
    good = vizwiz_item() if name == "vizwiz" else vsr_item()
    path = tmp_path / {"vizwiz": "val.json", "vsr": "test.jsonl"}[name]
    lines = [json.dumps(good), json.dumps(item)]
    path.write_text(f"[{', '.join(lines)}]" if name == "vizwiz" else "\n".join(lines))
    where = {"vizwiz": "val.json, record 1", "vsr": "test.jsonl, line 2"}[name]
    with pytest.raises(BrokenDataError, match=f"{where}: .*{message}"):
        read_benchmark(name, path, images)


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_broken_files_are_named(images, tmp_path):
    for name in ("vizwiz", "vsr", "refcoco"):
        with pytest.raises(FileNotFoundError, match="no annotations at .*nowhere"):
            read_benchmark(name, tmp_path / "nowhere.jsonl", images)
    (tmp_path / "val.json").write_text("[]")
    with pytest.raises(BrokenDataError, match=r"val.json has no records"):
        read_vizwiz(tmp_path / "val.json", images)
    (tmp_path / "test.jsonl").write_text("{")
    with pytest.raises(BrokenDataError, match="test.jsonl, line 1: not valid JSON"):
        read_vsr(tmp_path / "test.jsonl", images)
    with pytest.raises(ValueError, match="split is for refcoco, whose file has all of them; got 'val' for vsr"):
        read_benchmark("vsr", tmp_path / "test.jsonl", images, "val")
    # A pickle is read, and never run.
    path = write_refcoco(tmp_path, [Touch(tmp_path / "made")])
    with pytest.raises(ValueError, match=r"refs\(unc\).p is no pickle of plain values: it asks for"):
        read_refcoco(path, images)
    assert not (tmp_path / "made").exists()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is no pickle of plain values"):
        read_refcoco(path, images)
    (tmp_path / "instances.json").unlink()
    path.write_bytes(pickle.dumps([{"split": "val"}]))
    with pytest.raises(FileNotFoundError, match=r"no annotations at .*instances.json, which belong to refs\(unc\).p"):
        read_refcoco(path, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refs": {"a": 1}}, "must hold a list of dictionaries"),
        ({"refs": [{"split": "val", "ann_id": 99, "image_id": 7}]}, "record 0: `ann_id` 99 is not in instances.json"),
        ({"refs": [{"split": "val", "ann_id": 10, "image_id": [7]}]}, r"`image_id` \[7\] is not in instances.json"),
        ({"refs": [{"split": "val", "ann_id": 10, "image_id": 7}]}, "`sentences` must be a list of dictionaries"),
        ({"refs": [{"split": "val", "ann_id": 10, "image_id": 7, "sentences": [{}]}]}, "`sent` must be a text"),
        ({"instances": {"images": []}}, "`annotations` must be a list of objects with an `id`|`ann_id`|`image_id`"),
        ({"instances": []}, "`images` must be a list of objects with an `id`"),
        ({"box": [4, 3, 16]}, "`bbox` must be four numbers"),
        ({"box": [4, 3, 16, float("nan")]}, "`bbox` must be four numbers"),
        ({"box": [4, 3, 0, 15]}, r"its box \[4, 3, 0, 15\] is empty or outside of its image of 40 x 30"),
        ({"box": [4, 3, 38, 15]}, "is empty or outside of its image"),
    ],
)
def test_a_broken_expression_is_named(change, message, images, tmp_path):
    if "box" in change:
        image = {"id": 7, "file_name": "red.png", "width": 40, "height": 30}
        change = {"instances": {"images": [image], "annotations": [{"id": 10, "bbox": change["box"]}]}}
    path = write_refcoco(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        read_refcoco(path, images)


def write_parquet(folder: Path, rows: list[dict], split: str = "val", files: int = 2, of: int | None = None) -> Path:
    """The files of a split as the Hub has them, in row groups of two."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    for i in range(files):
        part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
        name = f"{split}-{i:05}-of-{of or files:05}.parquet"
        parquet.write_table(pa.Table.from_pylist(part), folder / name, row_group_size=2)
    return folder


def parquet_rows(images: Path) -> list[dict]:
    """Seven things, in red and blue images of 40 x 30 pixels, with one or two expressions each."""
    return [
        {"question_id": str(i), "question": "Please describe the region.", "answer": [f"thing {i}"] + ["it"] * (i % 2),
         "image": {"bytes": (images / f"{('red', 'blue')[i % 2]}.png").read_bytes(), "path": None},
         "bbox": [4.0 + i, 3.0, 16.0, 15.0], "iscrowd": 0, "file_name": f"{i}.jpg"}
        for i in range(7)
    ]  # fmt: skip


def test_refcoco_from_parquet(vlm, images, tmp_path, monkeypatch):
    rows = parquet_rows(images)
    folder = write_parquet(tmp_path / "data", rows)
    write_parquet(folder, rows[:1], "testA", 1)
    found = read_refcoco(folder)
    texts = [r.turns[0].text.partition(": ")[2] for r in found.records]
    assert texts == [f'"{text}"' for row in rows for text in row["answer"]]
    # As from the published files.
    by_pickle = read_refcoco(write_refcoco(tmp_path), images)
    assert found.records[0].turns[0].text.partition(": ")[0] == by_pickle.records[0].turns[0].text.partition(": ")[0]
    assert found.truths[:3] == (Box(0.1, 0.1, 0.5, 0.6), *[Box(0.12, 0.1, 0.53, 0.6)] * 2)
    pictures = [read_image(r.images[0]) for r in found.records]
    assert [p.getpixel((0, 0)) for p in pictures] == [
        (255, 0, 0) if i % 2 == 0 else (0, 0, 255) for i, row in enumerate(rows) for _ in row["answer"]
    ]
    assert len(read_benchmark("refcoco", folder, split="testA").records) == 1
    # Asked in any order, each row group is read once.
    reads, read = [], ParquetTable._read
    monkeypatch.setattr(ParquetTable, "_read", lambda self, *a: reads.append(a[:2]) or read(self, *a))
    want = vlm.generate([r.turns[0].text for r in found.records], pictures, GenerationConfig(4))
    assert found.ask(vlm, 3, 4) == want
    assert len(reads) == len(set(reads)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": []}, "row 000000006 in .*data: `answer` must be a list of texts"),
        ({"answer": [" "]}, "row 000000006 in .*data: `answer` must be a text, got ' '"),
        ({"bbox": [4.0, 3.0, 16.0]}, "row 000000006 in .*data: `bbox` must be four numbers"),
        ({"bbox": [4.0, 3.0, 38.0, 15.0]}, "is empty or outside of its image of 40 x 30"),
        ({"image": {"bytes": b"no image", "path": None}}, "row 000000006 in .*data is no image"),
        ({"image": {"bytes": None, "path": "6.jpg"}}, "row 6 of .*data: `image` must be a structure with `bytes`"),
    ],
)
def test_a_broken_row_of_parquet_is_named(change, message, images, tmp_path):
    rows = parquet_rows(images)
    rows[-1] |= change
    with pytest.raises(BrokenDataError, match=message):
        read_refcoco(write_parquet(tmp_path / "data", rows))


def test_broken_parquet_files_are_named(images, tmp_path, monkeypatch):
    rows = parquet_rows(images)
    folder = write_parquet(tmp_path / "data", rows)
    with pytest.raises(
        FileNotFoundError, match=r"no parquet file testB-\*.parquet, but val-00000-of-00002.parquet, val-0"
    ):
        read_refcoco(folder, split="testB")
    with pytest.raises(ValueError, match="images must be left out: the parquet files in .*data hold them"):
        read_refcoco(folder, images)
    with pytest.raises(BrokenDataError, match="has no columns answer, bbox, but image"):
        read_refcoco(write_parquet(tmp_path / "other", [{"image": row["image"]} for row in rows]))
    with pytest.raises(BrokenDataError, match="has 2 of the 3 files of split 'val'"):
        read_refcoco(write_parquet(tmp_path / "part", rows, of=3))
    (folder / "val-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(BrokenDataError, match="val-00001-of-00002.parquet is damaged, or no parquet file"):
        read_refcoco(folder)
    with pytest.raises(FileNotFoundError, match="no parquet file val-.*, but no parquet file"):
        read_refcoco(images)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="needs the pyarrow package: pip install pyarrow"):
        read_refcoco(folder)


# The command.


def test_the_command_asks_and_prints(vlm, images, tmp_path, capsys):
    vlm.save_pretrained(tmp_path / "model")
    (tmp_path / "val.json").write_text(json.dumps([vizwiz_item(), vizwiz_item(image="blue.png")]))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(vsr_item(caption=c)) for c in "abcdefgh"))
    write_refcoco(tmp_path)
    files = {"vizwiz": "val.json", "vsr": "test.jsonl", "refcoco": "refs(unc).p"}
    for name, file in files.items():
        out = tmp_path / "out" / f"{name}.json"
        cli.main(["evaluate", str(tmp_path / "model"), "--benchmark", name, "--data", str(tmp_path / file),
                  "--images", str(images), "--output", str(out), "--max-new-tokens", "4", "--batch-size", "3",
                  "--device", "cpu"])  # fmt: skip
        shown, written = capsys.readouterr().out, json.loads(out.read_text())
        questions = read_benchmark(name, tmp_path / file, images)
        assert questions.scores(written["answers"]) == written["figures"]
        for figure, share in written["figures"].items():
            assert f"{figure:<14} {share:.2%}\n" in shown
        assert f"of {len(questions.records)} questions" in shown
        prompts = [r.turns[0].text for r in questions.records]
        pictures = [r.images[0] for r in questions.records]
        if name == "vsr":
            # The likelier of the two words, whatever follows it.
            scores = vlm.score(prompts, pictures, [("True", "False")] * len(prompts), with_end=False)
            assert written["answers"] == ["False" if f.logprob > t.logprob else "True" for t, f in scores]
            tokens = vlm.tokenizer.encode("True")
            assert {t.tokens for t, _ in scores} == {len(tokens)}
        else:
            assert written["answers"] == vlm.generate(prompts, pictures, GenerationConfig(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "vsr"], "--benchmark vsr needs --data, its annotations"),
        (["--split", "val"], "--split is for --benchmark refcoco"),
        (["--benchmark", "vsr", "--data", "nowhere.jsonl"], "no annotations at nowhere.jsonl"),
    ],
)
def test_the_command_refuses_what_does_not_fit(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(["evaluate", "model", *arguments])
