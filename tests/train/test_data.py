"""Annotations, easy-VQA, and the command line."""

from __future__ import annotations

import concurrent.futures
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.makers import save_images
from tests.train.makers import qa_record, tiny_vlm
from vlmamba import cli
from vlmamba.model import VLM, GenerationConfig, Tokenizer, Turn, collate
from vlmamba.model.image import open_image
from vlmamba.model.prompt import IGNORE, IMAGE_TOKEN, get_template
from vlmamba.train import easy_vqa, json_records
from vlmamba.train.attribute_classifier import AttributeClassifier, AttributeImages, collate_augmented
from vlmamba.train.config import StageConfig
from vlmamba.train.demo import results_table
from vlmamba.train.errors import BrokenDataError, ChangedDataError
from vlmamba.train.evaluate import answer_all
from vlmamba.train.loop import train_stage
from vlmamba.train.recipes import FAMILIES, Family, tiny_config
from vlmamba.train.records import Record, read_llava, write_llava
from vlmamba.train.samples import Conversations
from vlmamba.train.sources import open_source, read_image


@pytest.fixture
def images(tmp_path):
    save_images(tmp_path, ("red", "blue"), (64, 64))
    return tmp_path


def records(folder: Path) -> list[Record]:
    return [qa_record("color?", c, folder / f"{c}.png") for c in ("red", "blue")]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_records_are_read(images, suffix):
    items = [
        {"id": 1, "image": "red.png", "conversations": [
            {"from": "human", "value": "<image>\ncolor?"}, {"from": "gpt", "value": "red"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]},
        {"id": 2, "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    ]  # fmt: skip
    path = images / f"data{suffix}"
    path.write_text(json.dumps(items) if suffix == ".json" else "\n".join(map(json.dumps, items)) + "\n")
    first, second = read_llava(path)
    assert first.images == (images / "red.png",)
    assert [t.role for t in first.turns] == ["user", "assistant", "user", "assistant"]
    assert second == qa_record("hello", "hi")


def test_written_records_come_back(images):
    write_llava(records(images), images / "out.json", images)
    again = read_llava(images / "out.json")
    assert [r.images for r in again] == [r.images for r in records(images)]
    assert again[0].turns[0].text == "<image>\ncolor?"


GOOD = '{"image": "red.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'


MALFORMED = [
    ("d.jsonl", GOOD + "\n" + GOOD[:40], "1 of 2 records are broken.*d.jsonl, line 2: not valid JSON"),
    ("d.jsonl", "[1]", "line 1: a record must be an object with a list `conversations`"),
    ("d.jsonl", GOOD.replace('"gpt"', '"bot"'), "line 1: a turn must be .*'bot'"),
    ("d.jsonl", GOOD.replace('"gpt"', '"human"'), "line 1: turn 1 of a conversation must be by"),
    ("d.jsonl", GOOD.replace("red.png", "green.png"), "line 1: no image green.png in "),
    ("d.json", f"[{GOOD}, {GOOD.replace('red', 'no')}]", "d.json, record 1: no image no.png in"),
    (
        "d.jsonl",
        GOOD.replace('"red.png"', '["red.png", "blue.png"]'),
        "line 1: there must be a mark <image> for each image, got 0 marks for 2 images",
    ),
    ("d.jsonl", GOOD.replace('"red.png"', "7"), "line 1: `image` must be a name or a list of names, got 7"),
    ("d.jsonl", GOOD[: GOOD.index(', {"from": "gpt')] + "]}", "the last turn must be an answer"),
    ("d.jsonl", GOOD.replace('"red.png"', '""'), "line 1: `image` must be a name or a list of names, got ''"),
    ("d.jsonl", GOOD.replace('"red.png"', '{"bytes": "x"}'), "line 1: `image` must be .*names, got {'bytes'"),
    ("d.jsonl", GOOD.replace('"image"', '"images": ["blue.png"], "image"'), "differ: 'red.png' and 'blue.png'"),
    ("d.jsonl", GOOD.replace('"gpt"', '["gpt"]'), "line 1: a turn must be"),
    ("d.jsonl", "5", "line 1: a record must be an object"),
    ("d.jsonl", '"text"', "line 1: a record must be an object"),
    ("d.json", "[[], 1]".replace("1", GOOD), "record 0: a record must be an object"),
    ("d.json", f"[1234, {GOOD}]", "record 0: a record must be an object"),
    ("d.jsonl", GOOD.replace('"a"', r'"\ud83d"'), r"line 1: not valid JSON: it has half a surrogate pair, U\+D83D"),
    ("d.json", f"[{GOOD.replace(chr(34) + 'a' + chr(34), chr(34) + chr(92) + 'ud83d' + chr(34))}]", "half a surrogate"),
    ("d.jsonl", GOOD.replace("{", '{"id": ' + "9" * 5000 + ",", 1), "line 1: not valid JSON: .*digits"),
    ("d.json", "[" + GOOD.replace("{", '{"id": ' + "9" * 5000 + ",", 1) + "]", "record 0: not valid JSON: .*digits"),
    ("d.jsonl", GOOD.replace("{", '{"x": ' + "[" * 99999 + "]" * 99999 + ",", 1), "line 1: .*nested too deeply"),
    (
        "d.json",
        "[" + GOOD.replace("{", '{"x": ' + "[" * 99999 + "]" * 99999 + ",", 1) + "]",
        ": it is nested",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), MALFORMED)
def test_broken_records_are_named_or_left_out(images, name, text, message, caplog):
    (images / name).write_text(text)
    with pytest.raises(BrokenDataError, match=message):
        read_llava(images / name)
    n_records = max(1, len(text.split("\n")), text.count("conversations") + ("record 0: a record" in message))
    assert len(read_llava(images / name, max_broken=1.0)) == n_records - 1
    assert re.search(message.removeprefix("1 of 2 records are broken.*"), caplog.text)


def test_many_missing_images_are_counted_and_the_first_few_named(images):
    items = [GOOD] * 3 + [GOOD.replace("red", f"gone{i}") for i in range(7)]
    (images / "d.jsonl").write_text("\n".join(items))
    with pytest.raises(BrokenDataError, match=r"7 of 10 records are .*gone0.*gone4.png in [^;]*; and 2 more"):
        read_llava(images / "d.jsonl")
    with pytest.raises(BrokenDataError, match="more than max_broken = 0.69 allows"):
        read_llava(images / "d.jsonl", max_broken=0.69)
    left = read_llava(images / "d.jsonl", max_broken=0.7)
    assert len(left.broken) == 7 and "gone6.png" in left.broken[-1]
    assert len(left) == 3 and left.location(2) == f"{images / 'd.jsonl'}, line 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD, "must hold a list of records, but starts with '{'"),
        ("", "must hold a list of records, but starts with ''"),
        (f"[{GOOD}, ", r"is truncated \(record 1, after byte"),
        (f"[{GOOD}", r"is truncated \(record 1, after byte"),
        (f"[{GOOD} {GOOD}]", "has '{' where a comma must be"),
        (f"[{GOOD}] 5", "has text after the end"),
        (f'[{GOOD}, {{"a": nothing, "b": "{"x" * 200}"}}]', "is not valid JSON: Expecting value .record 1"),
    ],
)
def test_a_file_that_is_no_list_is_an_error(images, text, message):
    (images / "d.json").write_text(text)
    with pytest.raises(ValueError, match=f"d.json {message}"):
        read_llava(images / "d.json", max_broken=0.9)


def test_a_list_truncated_anywhere_is_reported_as_truncated(images, monkeypatch):
    monkeypatch.setattr(json_records, "READ_BYTES", 7)
    text = json.dumps([json.loads(GOOD.replace('"a"', '"\\u00fc \\n \\" é 漢"'))] * 2, ensure_ascii=False).encode()
    for end in range(1, len(text)):
        (images / "d.json").write_bytes(text[:end])
        with pytest.raises(ValueError, match="d.json (is truncated|is not UTF-8)"):
            read_llava(images / "d.json")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_records_are_found_with_any_size_of_reads(images, monkeypatch, chunk, ascii_only):
    monkeypatch.setattr(json_records, "READ_BYTES", chunk)
    texts = ["naïve 漢字 🙂", 'quote " and \\ slash', "x" * 50]
    items = [{"image": "red.png", "conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": t}]}
             for t in texts]  # fmt: skip
    (images / "d.json").write_text(json.dumps(items, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
    found = read_llava(images / "d.json")
    assert [r.turns[1].text for r in found] == texts
    assert [r.turns[0].text for r in found[1:]] == texts[1:]
    assert [found.location(i)[-8:] for i in range(3)] == ["record 0", "record 1", "record 2"]


def test_several_files_are_mixed_each_with_its_images(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (images / "blue.png").rename(other / "blue.png")
    (images / "a.jsonl").write_text(GOOD)
    (images / "b.json").write_text(f"[{GOOD.replace('red', 'blue')}]")
    mixed = read_llava([images / "a.jsonl", images / "b.json"], [None, other])
    assert [r.images for r in mixed] == [(images / "red.png",), (other / "blue.png",)]
    with pytest.raises(ValueError, match="images must be one for all paths or one for each of 2, got 1"):
        read_llava([images / "a.jsonl", images / "b.json"], [other])


def test_a_missing_image_folder_is_named(images):
    (images / "d.jsonl").write_text(GOOD)
    with pytest.raises(FileNotFoundError, match="no image folder or archive at .*nowhere"):
        read_llava(images / "d.jsonl", images / "nowhere")
    with pytest.raises(ValueError, match=r"images must be a folder, a .zip or a .tar, got .*d.jsonl"):
        read_llava(images / "d.jsonl", images / "d.jsonl")


def test_annotations_that_change_under_the_training_are_noticed(images):
    (images / "d.jsonl").write_text(GOOD)
    found = read_llava(images / "d.jsonl")
    (images / "d.jsonl").write_text(GOOD + " ")
    with pytest.raises(ChangedDataError, match="d.jsonl has changed since it was read"):
        found[0]
    (images / "d.jsonl").unlink()
    with pytest.raises(ChangedDataError, match="d.jsonl does not exist any more"):
        found[0]


def new_model(family: Family = "vl-mamba") -> VLM:
    return tiny_vlm(family, TOKENIZER)


def archive(folder: Path, kind: str) -> Path:
    """The folder's images in an archive, under a name in a folder and one without."""
    path = folder / f"images.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(folder / "red.png", "./red.png")
            tar.add(folder / "blue.png", "sub/blue.png")
    else:
        with zipfile.ZipFile(path, "w") as file:
            red = zipfile.ZipInfo("red.png")  # stored
            red.extra = b"\xfe\xca\x02\x00ab"
            file.writestr(red, (folder / "red.png").read_bytes())
            file.write(folder / "blue.png", "sub/blue.png", zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_images_in_an_archive_are_those_of_the_folder(images, kind):
    path = archive(images, kind)
    (images / "d.jsonl").write_text(GOOD + "\n" + GOOD.replace("red.png", "sub/blue.png"))
    packed = pickle.loads(pickle.dumps(read_llava(images / "d.jsonl", path)))
    model = new_model()
    for record, name in zip(packed, ("red", "blue"), strict=True):
        assert list(read_image(record.images[0]).getcolors()) == list(open_image(images / f"{name}.png").getcolors())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(Conversations(packed, model).__getitem__, [0, 1] * 20))
    assert all(torch.equal(s.images[0].pixels[0], seen[i % 2].images[0].pixels[0]) for i, s in enumerate(seen))
    assert answer_all(model, packed) == answer_all(model, [Record(r.turns, (images / f"{c}.png",)) for r, c in
                                                           zip(packed, ("red", "blue"), strict=True)])  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no image green.png in"):
        open_source(path)["green.png"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_damaged_archive_is_named(images, kind):
    path = archive(images, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if kind == "zip" else whole[: whole.rindex(b"\x89PNG") + 20])
    with pytest.raises(ValueError, match=f"images.{kind} is damaged or truncated"):
        open_source(path)
    path.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=f"images.{kind} is damaged"):
        open_source(path)
    at = whole.index(b"IDAT") + 6
    path.write_bytes(whole[:at] + bytes(b ^ 255 for b in whole[at : at + 20]) + whole[at + 20 :])
    reason = "is damaged: its checksum is wrong" if kind == "zip" else "is damaged or (truncated|cut short)"
    with pytest.raises(ValueError, match=rf"red.png in \S*images.{kind} {reason}"):
        read_image(open_source(path)["red.png"])


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_changes_under_the_training_is_noticed(images, kind):
    path = archive(images, kind)
    (images / "d.jsonl").write_text(GOOD)
    conversations = Conversations(read_llava(images / "d.jsonl", path), new_model())
    assert conversations[0].images
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    with pytest.raises(ChangedDataError, match=f"images.{kind} has changed since it was read"):
        conversations[0]
    path.unlink()
    with pytest.raises(ChangedDataError, match=f"images.{kind} does not exist any more"):
        conversations[0]


def shard(folder: Path, name: str, entries: dict[str, bytes]) -> Path:
    with tarfile.open(folder / name, "w") as tar:
        for entry, content in entries.items():
            info = tarfile.TarInfo(entry)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / name


def test_webdataset_shards_are_records_and_images(images):
    red, blue = ((images / f"{c}.png").read_bytes() for c in ("red", "blue"))
    text = GOOD.replace('"image": "red.png", ', "")
    folder = images / "shards"
    folder.mkdir()
    shard(folder, "s-00.tar", {"000.png": red, "000.json": GOOD.encode(), "001.json": text.encode(), "001.txt": b"x"})
    shard(folder, "s-01.tar", {"in/000.json": text.encode(), "in/000.png": blue})
    for path in (folder, f"{folder}/s-{{00..01}}.tar"):
        found = read_llava(path)
        colors = [bool(r.images) and read_image(r.images[0]).getpixel((0, 0)) for r in found]
        assert colors == [(255, 0, 0), False, (0, 0, 255)]
        assert found[1].turns == (Turn("user", "a"), Turn("assistant", "b"))
        assert found.location(2) == f"{folder / 's-01.tar'}, in/000.json"
    assert [len(read_llava(p)) for p in (folder / "s-00.tar", [folder, folder / "s-01.tar"])] == [2, 4]
    with pytest.raises(FileNotFoundError, match="no annotations at .*s-02.tar"):
        read_llava(f"{folder}/s-{{00..02}}.tar")
    shard(folder, "s-01.tar", {"1.png": red, "2.json": b"{", "3.json": text.encode()})
    with pytest.raises(BrokenDataError, match=r"2 of 5 .*s-01.tar, 1.png: an image without a .json.*2.json: not valid"):
        read_llava(folder)
    two = {"1.png": red, "1.jpg": red, "1.json": text.encode(), "2.json": text.encode(), "2.JSON": text.encode()}
    shard(folder, "s-01.tar", {**two, "3.json": text.encode()})
    with pytest.raises(BrokenDataError, match=r"1.json: it has several images, .*1.png, 1.jpg; .*several records: 2"):
        read_llava(folder)
    assert len(read_llava(folder / "s-01.tar", max_broken=0.7)) == 1


def test_text_beyond_the_context_is_truncated_and_an_answer_beyond_it_is_broken(images):
    model = new_model()
    whole = Conversations(records(images), model)[0]
    n_text = len(whole.input_ids) - model.image_tokens
    n_answer = sum(label != IGNORE for label in whole.labels)
    cut = Conversations(records(images), model, max_tokens=n_text - n_answer + 1)[0]
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)] and len(cut.input_ids) == len(cut.labels)
    assert sum(label != IGNORE for label in cut.labels) == 1
    with pytest.raises(ValueError, match=f"record 1: there is no target token within max_tokens = {n_text - n_answer}"):
        Conversations(records(images), model, max_tokens=n_text - n_answer)[1]
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        Conversations(records(images), model, max_tokens=0)


def test_easy_vqa_is_exported_in_llavas_format(tmp_path):
    captions, train, test = (read_llava(path) for path in easy_vqa.export(tmp_path))
    here = [r for r in easy_vqa.load("test")]
    assert len(test) == len(here)
    assert test[77].turns[1] == here[77].turns[1] and test[77].turns[0].text == "<image>\n" + here[77].turns[0].text
    assert test[77].images[0].read_bytes() == here[77].images[0].read_bytes()
    assert sum(len(r.turns) for r in train) == 2 * (len(easy_vqa.load("train")) + len(captions))
    assert len(captions) == len(easy_vqa.captions(easy_vqa.load("train")))


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotations at"):
        read_llava(tmp_path / "nothing.json")


def test_easy_vqa_is_as_published():
    train, test = easy_vqa.load("train"), easy_vqa.load("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({r.images for r in [*train, *test]}) == 5_000
    assert len({r.turns[1].text for r in train}) == 13
    assert round(easy_vqa.scores(test, ["yes"] * len(test))["overall"], 3) == 0.373


def test_attributes_agree_with_every_question():
    """Attributes deduced from some questions about an image contradict none of the others."""
    train = easy_vqa.load("train")
    known = easy_vqa.attributes(train)
    assert len(known) > 3000
    for record in train:
        if record.images[0] not in known:
            continue
        color, shape = known[record.images[0]]
        question, answer = (t.text for t in record.turns)
        if answer in easy_vqa.COLORS:
            assert answer == color
        elif answer in easy_vqa.SHAPES:
            assert answer == shape
        else:
            words = question.rstrip("?").split()
            named = {w for w in words if w in easy_vqa.COLORS + easy_vqa.SHAPES}
            holds = named <= {color, shape}
            assert (answer == "yes") == (holds != bool({"no", "not"} & set(words)))
    caption = easy_vqa.captions(train)[0]
    assert caption.turns[1].text == "a {} {}".format(*known[caption.images[0]])


def test_scores_by_category():
    asked = [qa_record("", a) for a in ("yes", "no", "red", "circle")]
    assert easy_vqa.scores(asked, ["yes", "yes", "red", "square"]) == {
        "overall": 0.5, "yes/no": 0.5, "color": 1.0, "shape": 0.0,
    }  # fmt: skip


TOKENIZER = Tokenizer.train(["color?", "red", "blue"], 280)


@pytest.mark.parametrize("keep_samples", [True, False])
def test_samples_are_prepared_again_unless_kept(images, keep_samples):
    again = [*records(images), *records(images)]
    samples = Conversations(again, new_model(), keep_samples=keep_samples)
    first, same_image = samples[0], samples[2]
    assert (samples[0] is first) == keep_samples
    assert (same_image.images[0] is first.images[0]) == keep_samples


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_trained_to_distinguish_two_images(family, images, tmp_path):
    """The two stages of the demo on two images, then free generation."""
    torch.manual_seed(0)
    model = new_model(family)
    data = Conversations(records(images), model, keep_samples=True)
    align = StageConfig("align", ("connector",), lr=5e-3, epochs=10, batch_size=4, warmup_ratio=0)
    finetune = StageConfig(
        "finetune", ("connector", "language_model"), lr=5e-3, epochs=60, batch_size=4, warmup_ratio=0
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    train_stage(model, align, data, collate, tmp_path / "align")
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"connector"}
    train_stage(model, finetune, data, collate, tmp_path / "finetune")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("vision"))
    assert answer_all(model, records(images), batch_size=1) == ["red", "blue"]
    assert len(set(answer_all(model, records(images), with_images=False))) == 1


def test_a_damaged_image_in_a_set_is_named(images):
    model = new_model()
    (images / "blue.png").write_bytes((images / "blue.png").read_bytes()[:50])
    with pytest.raises(ValueError, match="blue.png"):
        Conversations(records(images), model)[1]


def test_an_encoder_is_trained_to_classify_attributes(images, tmp_path):
    torch.manual_seed(0)
    attributes = {images / f"{c}.png": (c,) for c in ("red", "blue")}
    data = AttributeImages(attributes, [("blue", "red")], tiny_config("vl-mamba", 1).vision[0].processor)
    model = AttributeClassifier(tiny_config("vl-mamba", 1).vision[0].encoder, [2])
    stage = StageConfig("vision", ("",), lr=1e-3, epochs=20, batch_size=2)
    train_stage(model, stage, data, collate_augmented, tmp_path / "vision")
    assert model.accuracy(data) == 1


def test_results_are_a_table():
    row = {"overall": 0.5, "yes/no": 0.25, "color": 1.0, "shape": 0.0}
    assert results_table({"x": row}).splitlines()[1].split() == ["x", "50.0%", "25.0%", "100.0%", "0.0%"]


@pytest.fixture
def saved(images):
    model = new_model("ml-mamba")
    model.save_pretrained(images / "model")
    return images / "model"


def test_the_command_trains_evaluates_and_generates(saved, images, capsys):
    write_llava(records(images) * 4, images / "data.json", images)
    cli.main(["train", str(saved), str(images / "data.json"), "--output", str(images / "run"), "--epochs", "2",
              "--batch-size", "4", "--micro-batch-size", "2"])  # fmt: skip
    trained = VLM.from_pretrained(images / "run" / "model")
    start = VLM.from_pretrained(saved)
    assert not torch.equal(trained.connector.mlp[0].weight, start.connector.mlp[0].weight)
    cli.main(["evaluate", str(images / "run" / "model"), "--data", str(images / "data.json")])
    cli.main(["generate", str(images / "run" / "model"), "color?", "--image", str(images / "red.png"),
              "--max-new-tokens", "4"])  # fmt: skip
    out = capsys.readouterr().out
    assert "exact match" in out
    want = trained.generate(["color?"], [images / "red.png"], GenerationConfig(4))[0]
    assert out.rstrip("\n").endswith(want.rstrip("\n"))


def test_chat_obeys_its_commands(saved, images, monkeypatch, capsys):
    lines = iter(
        ["/image nowhere.png", f"/image {images / 'red.png'}", "color?", "/dance", "/reset", "color?", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    cli.main(["chat", str(saved), "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert "no image at nowhere.png" in out
    assert "no command /dance" in out
    assert next(lines, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no-such-folder/model", "hello"], "vlmamba: "),
        (["train", "nowhere", "data.json", "--output", "out"], "no annotations at data.json"),
    ],
)
def test_an_error_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert message in str(end.value)


@pytest.mark.parametrize("command", [[], ["train"], ["demo"], ["chat"], ["reproduce"]])
def test_help_is_there(command):
    out = subprocess.run(
        [sys.executable, "-m", "vlmamba", *command, "--help"], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0
    assert "usage: vlmamba" in out.stdout


def test_conversations_ask_every_question_once_about_one_image_each():
    train = easy_vqa.load("train")[:500]
    joined = easy_vqa.conversations(train, 4)
    assert max(len(r.turns) for r in joined) == 8
    pairs = [(r.images, q.text, a.text) for r in joined for q, a in zip(r.turns[::2], r.turns[1::2], strict=True)]
    # Each image whose questions determine its attributes is described once, before any question about it.
    described = easy_vqa.captions(train)
    assert sorted(pairs) == sorted((r.images, *(t.text for t in r.turns)) for r in [*train, *described])
    first = {}
    for image, question, _ in pairs:
        first.setdefault(image, question)
    assert described and all(first[r.images] == "describe the image" for r in described)


def ask(value="a", **extra):
    return {**extra, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (ask("<image>\na"), r"got 1 marks \(1 in turn 0\) for 0 images"),
        (ask("<image>\na", image=None), "got 1 marks"),
        (ask("<image>\na", image=[]), "got 1 marks"),
        (ask(img="red.png"), "it has `img`: 'red.png', but only `image` is read as an image"),
        (ask(image_path=["red.png"]), "it has `image_path`"),
        (ask(file_name="red.png"), "it has `file_name`"),
        (ask(picture={"bytes": "aGk="}), "it has `picture`"),
        (ask("<image>", images=["red.png", "blue.png"]), r"got 1 marks \(1 in turn 0\) for 2 images"),
        (ask(images=[{"path": "red.png"}]), "`images` must be a name or a list of names, got {'path': 'red.png'}"),
        (ask(image="red.heic"), "no image red.heic in"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_record_that_mentions_an_image_and_has_none_is_broken(images, item, message, suffix):
    items = [ask(), item, ask(image="blue.png")]
    text = json.dumps(items) if suffix == ".json" else "\n".join(map(json.dumps, items))
    (images / f"d{suffix}").write_text(text)
    found = read_llava(images / f"d{suffix}", max_broken=0.5)
    assert [r.images for r in found] == [(), (images / "blue.png",)]
    assert re.search(message, found.broken[0])
    assert str(found) == "2 records, 1 of them with an image; 1 more are broken and left out"


@pytest.mark.parametrize("extra", [{"image": ["red.png"]}, {"images": ["red.png"]}, {"images": "red.png"},
                                   {"image": "red.png", "images": ["red.png"], "image_id": "7"}])  # fmt: skip
def test_one_image_is_read_however_it_is_written(images, extra):
    (images / "d.jsonl").write_text(json.dumps(ask("no mark of it", **extra)))
    assert read_llava(images / "d.jsonl")[0].images == (images / "red.png",)


def several_images() -> dict:
    turns = ["<image>\n<image>\nwhich is red?", "the first", "and <image>?", "it is blue"]
    names = ["red.png", "blue.png", "blue.png"]
    return {"image": names, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}  # fmt: skip


def test_several_images_are_read_written_and_prepared_in_order(images):
    (images / "d.jsonl").write_text(json.dumps(several_images()) + "\n" + GOOD)
    found = read_llava(images / "d.jsonl")
    assert [[p.stem for p in r.images] for r in found] == [["red", "blue", "blue"], ["red"]]
    assert (str(found), found[1:].n_with_image) == ("2 records, 2 of them with an image", 1)
    write_llava(found, images / "again.json", images)
    assert [r.images for r in read_llava(images / "again.json")] == [r.images for r in found]
    model = new_model()
    sample = Conversations(found, model)[0]
    means = [image.pixels[0].mean((0, 2, 3)).argmax() for image in sample.images]
    assert means == [0, 2, 2]
    assert sample.input_ids.count(IMAGE_TOKEN) == 3 * model.image_tokens
    assert model(collate([sample])).loss.isfinite()
    first = found[0].first_question()
    assert (first[0].text, [p.stem for p in first[1]]) == ("<image>\n<image>\nwhich is red?", ["red", "blue"])


def test_videos_are_folders_of_frames_or_animated_files(images):
    (images / "clip").mkdir()
    red, blue = (open_image(images / f"{c}.png") for c in ("red", "blue"))
    red.save(images / "clip" / "0.png")
    blue.save(images / "clip" / "1.png")
    red.save(images / "clip.gif", save_all=True, append_images=[blue])
    items = [ask("<image>\nand <image>", video=["clip", "clip.gif"]), ask(video="clip.gif"), ask(image="clip.gif")]
    (images / "d.jsonl").write_text("\n".join(map(json.dumps, items)))
    found = read_llava(images / "d.jsonl")
    model = new_model()
    samples = list(Conversations(found, model))
    assert [[i.n_views for i in s.images] for s in samples] == [[2, 2], [2], [1]]
    assert torch.equal(samples[0].images[0].pixels[0], samples[0].images[1].pixels[0])
    assert len(answer_all(model, found, max_new_tokens=1)) == 3
    write_llava(found, images / "again.json", images)
    assert [r.images for r in read_llava(images / "again.json")] == [r.images for r in found]
    for item, message in (
        (ask(video="gone.gif"), "no image gone.gif in"),
        (ask("<image><image>", video="clip", image="red.png"), "images and a video, whose order is unknown"),
        (ask("<image>", video=["clip", "clip.gif"]), r"got 1 marks \(1 in turn 0\) for 2 images"),
    ):
        (images / "broken.jsonl").write_text(json.dumps(item))
        with pytest.raises(BrokenDataError, match=message):
            read_llava(images / "broken.jsonl")


def test_several_images_of_a_shard_are_those_with_numbers(images):
    red, blue = ((images / f"{c}.png").read_bytes() for c in ("red", "blue"))
    text = json.dumps(several_images()).encode()
    path = shard(images, "s.tar", {"1.2.png": blue, "1.10.png": blue, "1.json": text, "1.1.png": red,
                                   "2.json": text, "2.0.png": red})  # fmt: skip
    found = read_llava(path, max_broken=0.5)
    assert [read_image(i).getpixel((0, 0))[0] for i in found[0].images] == [255, 0, 0]
    assert found[0].images[2].name == "1.10.png"
    assert "2.json: it names 'red.png', 'blue.png', 'blue.png', but the shard has 1 images for it" in found.broken[0]


@pytest.mark.parametrize("n", [1, 5, 9, 14, 20, 27, 32])
def test_truncation_keeps_images_whole(images, n):
    (images / "d.jsonl").write_text(json.dumps(several_images()))
    model, (record,) = new_model(), read_llava(images / "d.jsonl")
    whole = Conversations([record], model)[0]
    is_text = [t != IMAGE_TOKEN for t in whole.input_ids]
    end = [i for i, text in enumerate(is_text) if text][n - 1] + 1
    if all(label == IGNORE for label in whole.labels[1:end]):
        with pytest.raises(ValueError, match=f"no target token within max_tokens = {n}"):
            Conversations([record], model, max_tokens=n)[0]
        return
    cut = Conversations([record], model, max_tokens=n)[0]
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:end], whole.labels[:end])
    assert len(cut.images) * model.image_tokens == is_text[:end].count(False)
    assert model(collate([cut])).loss.isfinite()


def test_text_that_only_looks_like_an_image_is_no_image(images):
    plain = ask(id="7.jpg", image_id=7, image_size=None, images=[], image="", source="web")
    del plain["image"]
    plain["conversations"][1]["value"] = "write <image> there"
    (images / "d.jsonl").write_text(json.dumps(plain))
    assert read_llava(images / "d.jsonl")[0].images == ()


def test_a_byte_order_mark_is_no_part_of_the_data(images):
    mark, item = b"\xef\xbb\xbf", GOOD.replace('"a"', '"ü\u2028\x85"').encode()
    (images / "d.json").write_bytes(mark + b"[" + item + b",\r\n" + item + b"]")
    (images / "d.jsonl").write_bytes(mark + item + b"\r\n" + item + b"\r\n")
    for name in ("d.json", "d.jsonl"):
        assert [r.turns[0].text for r in read_llava(images / name)] == ["ü\u2028\x85"] * 2
        (images / name).write_bytes((images / name).read_bytes().decode().encode("utf-16"))
        with pytest.raises(ValueError, match=f"{name}: is UTF-16; save it as UTF-8"):
            read_llava(images / name, max_broken=0.5)


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_bytes_that_are_not_utf_8_are_the_fault_of_their_record(images, monkeypatch, chunk):
    monkeypatch.setattr(json_records, "READ_BYTES", chunk)
    good, bad = GOOD.replace('"a"', '"é"').encode(), GOOD.replace('"a"', '"é"').encode("latin-1")
    (images / "d.json").write_bytes(b"[" + b", ".join([good, bad, good]) + b"]")
    (images / "d.jsonl").write_bytes(b"\n".join([good, bad, good]))
    for name, place in (("d.json", "record 1"), ("d.jsonl", "line 2")):
        found = read_llava(images / name, max_broken=0.5)
        assert [r.turns[0].text for r in found] == ["é", "é"]
        assert re.search(f"{place}: not valid JSON: not UTF-8: byte 0xe9", found.broken[0])


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    "huge", ['"' + r"\"[{," * 200 + '"', "[" * 300 + '"]"' + "]" * 300, "9" * 700, '{"a": {"b": "' + "x" * 700 + '"}}']
)
def test_a_record_that_is_too_large_is_skipped_and_named(images, monkeypatch, chunk, huge):
    monkeypatch.setattr(json_records, "READ_BYTES", chunk)
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 600)
    items = [GOOD, GOOD.replace("{", f'{{"x": {huge},', 1), GOOD, huge, GOOD.replace('"a"', '"é"')]
    (images / "d.json").write_text(f"[{' , '.join(items)}]", encoding="utf-8")
    (images / "d.jsonl").write_text("\n".join(items), encoding="utf-8")
    for name, places in (("d.json", ("record 1", "record 3")), ("d.jsonl", ("line 2", "line 4"))):
        found = read_llava(images / name, max_broken=0.5)
        assert [r.turns[0].text for r in found] == ["a", "a", "é"]
        for place, reason in zip(places, found.broken, strict=True):
            assert f"{place}: it is larger than" in reason or (huge.startswith("9") and "must be an object" in reason)


def test_a_long_text_is_truncated_before_tokenization_with_the_same_tokens(images):
    model = new_model()
    word = "color? red blue "
    turns = (Turn("user", word * 3), Turn("assistant", word * 200), Turn("user", word * 20), Turn("assistant", "red"))
    lengths = []

    class Counting(Tokenizer):
        def encode(self, text):
            lengths.append(len(text))
            return super().encode(text)

    for family, template in (("vl-mamba", model.template), ("caption", get_template("caption"))):
        model.tokenizer, model.template = TOKENIZER, template
        want = Conversations([Record(turns)], model, max_tokens=None)[0]
        model.tokenizer = Counting(TOKENIZER.inner)
        for n in (50, 200):
            lengths.clear()
            got = Conversations([Record(turns)], model, max_tokens=n)[0]
            assert (got.input_ids, got.labels) == (want.input_ids[:n], want.labels[:n]), family
            assert sum(lengths) <= n * TOKENIZER.longest_token + 100 < 3000


def test_text_that_no_tokenizer_takes_is_a_broken_sample():
    made = Conversations([qa_record("\ud83d", "a")], new_model())
    with pytest.raises(ValueError, match=r"record 0: the text cannot be tokenized: .*ud83d"):
        made[0]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_records_of_an_archive_are_written_and_come_back(images, kind):
    path = archive(images, kind)
    (images / "d.jsonl").write_text(GOOD + "\n" + GOOD.replace("red.png", "sub/blue.png") + "\n" + json.dumps(ask()))
    found = read_llava(images / "d.jsonl", path)
    write_llava(found, images / "again.json", path)
    again = read_llava(images / "again.json", path)
    assert [r.images for r in again] == [r.images for r in found]
    write_llava(again, images / "third.json", path)
    assert [r.turns[0].text for r in read_llava(images / "third.json", path)] == ["<image>\na", "<image>\na", "a"]
    with pytest.raises(ValueError, match=rf"red.png in \S*images.{kind} is not in"):
        write_llava(found, images / "again.json", images)
    with pytest.raises(ValueError, match="red.png is not in .*elsewhere"):
        write_llava(records(images), images / "again.json", images / "elsewhere")
