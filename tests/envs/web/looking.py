"""An endpoint that takes images and answers by what their pixels show, and style sheets that spoil a page."""

import base64
import contextlib
import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

# What is appended to a good page's style: ten ways to look bad.
SPOILT = {
    "blank": "body { display: none; }",
    "white_on_white": "* { color: #fff !important; background: #fff !important; border-color: #fff !important; "
                      "outline-color: #fff !important; }",
    "faint": "html { opacity: 0.08; }",
    "below_the_window": "main { margin-top: 720px !important; }",
    "cut_off_at_the_left": "main { margin-left: -60px !important; padding-left: 0 !important; }",
    "cut_off_at_the_right": "main { margin-left: 1190px !important; }",
    "covered": "body::after { content: ''; position: fixed; inset: 0; background: #000; }",
    "half_covered": "body::after { content: ''; position: fixed; inset: 0 45% 0 0; background: #b00020; }",
    "tiny": "html { zoom: 0.25; }",
    "huge": "html { zoom: 6; }",
}
RED = "html, body, main { background: #b00020 !important; }"  # everything works, and this endpoint gives no point for it
INK = 24  # of 255: what differs more from the background


def scores(image: np.ndarray) -> list[int]:
    """Layout, completeness and quality, 0 to 10, of a screenshot [height, width, 3]."""
    image = image.astype(np.int32)
    colours, counts = np.unique(image @ [1 << 16, 1 << 8, 1], return_counts=True)
    most = int(colours[counts.argmax()])
    if most == 0xB00020:
        return [0, 0, 0]
    differs = np.abs(image - [most >> 16, most >> 8 & 255, most & 255]).max(axis=2)
    ink = differs > INK
    rows, columns = ink.any(axis=1), ink.any(axis=0)
    if not ink.any():
        return [0, 0, 0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rows.astype(np.int8), [0]])))
    heights = edges[1::2] - edges[::2]
    cut = columns[:2].any() or columns[-2:].any()
    late = rows.argmax() > len(rows) // 4
    return [0 if cut or late else 10, 10 if 0.003 < ink.mean() < 0.4 else 0,
            10 if 8 <= np.median(heights) <= 120 and np.quantile(differs[ink], 0.9) > 100 else 0]


class _Looking(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": []})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        system, user = (message["content"] for message in asked["messages"][:2])
        text = "\n".join(part["text"] for part in user if part["type"] == "text")
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).convert("RGB"))
                  for part in user if part["type"] == "image_url"]
        self.server.seen.append((text, len(images)))
        self._answer({"choices": [{"message": {"role": "assistant", "content": json.dumps(_answer(system, text, images))},
                                   "finish_reason": "stop"}]})

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def _answer(system: str, text: str, images: list[np.ndarray]) -> dict[str, Any]:
    if '{"scores"' in system:
        return {"scores": np.min([scores(image) for image in images], axis=0).tolist()}
    if '{"actions"' in system:
        elements = re.findall(r"(\d+)\. (\w+) ", text)
        return {"actions": [{"element": int(number), "do": "type" if role == "textbox" else "click", "text": "Milk"}
                            for number, role in elements][:3]}
    before, after = images
    return {"score": 10 if (before != after).any() else 0}


@contextlib.contextmanager
def endpoint() -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yields the URL of such an endpoint, and the texts and numbers of images that it was asked about."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Looking)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", server.seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def png(image: np.ndarray) -> bytes:
    """An image [height, width, 3] as a file."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()
