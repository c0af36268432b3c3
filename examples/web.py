"""A page of clric images beside AVIF and ThumbHash, in the browser: encodes photos into web-out/ and serves the page.

Run by ``make web``; the photos' paths are the arguments. What was encoded once is kept. The page is in
decoder/web/gallery.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from clric_decoder import ClricError
from clric_decoder.image import read_image
from clric_encoder import encode
from demo import as_file, avif_of_size
from PIL import features

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "decoder" / "web"
OUT = ROOT / "web-out"
QUALITY = 70  # at 50, files are smaller than any AVIF of the same photo
PREVIEW_BYTES = 500
PRESET = "default"

# Which folder answers an address that begins so. The first that fits counts.
FOLDERS = {
    "/made/": OUT,
    "/src/": WEB / "src",
    "/weights/": WEB / "weights",
    "/thumbhash/": WEB / "node_modules" / "thumbhash",
    "/": WEB / "gallery",
}
# No eval, no script of others; blobs are what the polyfill and dropped files are shown from.
POLICY = "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob: data:"


def main() -> None:
    """Encodes what is missing, writes the list of photos, and serves until it is interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--only-make", action="store_true", help="make the files, do not serve them")
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    entries = [make(photo) for photo in arguments.photos]
    (OUT / "photos.json").write_text(json.dumps(entries, indent=1))
    if not arguments.only_make:
        serve(arguments.port)


def make(photo: Path) -> dict:
    """The files of one photo, as the page wants to know them."""
    original = read_image(photo).pixels
    height, width = original.shape[:2]
    decoder = json.loads((ROOT / "decoder/clric_decoder/weights/small.json").read_text())["sha256"]

    def file(suffix: str, settings: object, content: Callable[[], bytes]) -> dict:
        """One file in web-out/, made where it is not there. Its name holds a hash of all that decides its content."""
        key = hashlib.sha256(photo.read_bytes() + f"{decoder} {PRESET} {settings}".encode()).hexdigest()[:12]
        path = OUT / f"{photo.stem}-{key}.{suffix}"
        if not path.exists():
            print(f"making {path.name} ...", flush=True)
            path.write_bytes(content())
        return {"file": path.name, "bytes": path.stat().st_size}

    entry = {"name": photo.stem, "width": width, "height": height}
    entry["original"] = file("png", None, lambda: as_file(original, "png"))
    entry["clric"] = file("clric", QUALITY, lambda: encode(original, quality=QUALITY, preset=PRESET))
    entry["preview"] = file("clric", PREVIEW_BYTES, lambda: encode(original, size=PREVIEW_BYTES, preset=PRESET))
    if features.check("avif"):
        entry["avif"] = file("avif", QUALITY, lambda: avif_of_size(original, entry["clric"]["bytes"]))
    return entry


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of `FOLDERS`, and says nothing of requests that succeed."""

    extensions_map: ClassVar = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".avif": "image/avif",
        ".clric": "image/x-clric",
    }

    def translate_path(self, path: str) -> str:
        path = urlsplit(path).path
        start = next(start for start in FOLDERS if path.startswith(start))
        self.directory = str(FOLDERS[start])
        return super().translate_path("/" + path[len(start) :])

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-cache")  # asks whether a file has changed
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def serve(port: int) -> None:
    """Serves until Ctrl-C, on this machine only."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        sys.exit(f"web: port {port} cannot be used ({error.strerror}); name another: make web PORT=8081")
    print(f"\nOpen http://localhost:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    try:
        main()
    except ClricError as error:
        sys.exit(f"web: {error}")
