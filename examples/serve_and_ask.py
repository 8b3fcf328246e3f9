"""A model behind OpenAI's HTTP interface, asked about an image with nothing but the standard library.

    python examples/serve_and_ask.py [MODEL]

Without MODEL it serves a tiny untrained one, whose answers are noise. It needs pip install '.[serve]'.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import urllib.request

from PIL import Image

from vlmamba.model import VLM, Tokenizer
from vlmamba.train.recipes import tiny_config

QUESTION = "What color is it?"


def save_model(folder: str) -> str:
    """Save a tiny untrained VL-Mamba and return its folder."""
    tokenizer = Tokenizer.train([QUESTION, "red"], vocab_size=280)
    VLM(tiny_config("vl-mamba", tokenizer.vocab_size), tokenizer).save_pretrained(folder)
    return folder


def ask(url: str, question: str, image: Image.Image) -> str:
    """Send one question about an image and return the answer."""
    png = io.BytesIO()
    image.save(png, "PNG")
    data = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
    body = {"model": "example", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else save_model(folder)
        command = [sys.executable, "-m", "vlmamba", "serve", model, "--name", "example", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                line = server.stdout.readline()  # "serving example at http://127.0.0.1:PORT"
                if not line:
                    sys.exit(server.wait())  # the server has printed the reason
                url = line.split()[-1]
                print(QUESTION, repr(ask(url, QUESTION, Image.new("RGB", (64, 64), "red"))))
            finally:
                server.terminate()  # running answers end first
