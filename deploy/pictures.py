"""Draws the panels of the dashboard: `python -m deploy.pictures [--seconds 240] [--model MODEL]`.

A real server runs under a mixed load, a real Prometheus scrapes it, and each panel's own queries are drawn in the
dashboard's grid, one picture per row of it, to docs/images/dashboard-*.png. Grafana itself is not needed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, PercentFormatter, StrMethodFormatter
from PIL import Image

from bench import mixture
from bench.options import model_folder
from bench.target import Target, jpeg, running, text_request
from deploy.dashboard import COLUMNS, Panel, sections
from deploy.scraping import Prometheus, scraping
from server.settings import Settings

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
SCRAPE_SECONDS = 2
# the interval of rates, as Grafana chooses it: four scrapes, or more if a picture has few points
RATE_INTERVAL = "20s"
NUM_POINTS = 160
# clients in each part of the time, and the shares of their requests that fetch a picture and that are refused
CLIENTS = (1, 4, 12, 2)
FETCHING, REFUSED = 0.1, 0.03
COLUMN_INCHES, ROW_INCHES, DPI, NUM_COLOURS, TITLE_LETTERS = 0.52, 0.36, 90, 128, 50
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
FORMATS: dict[str, Callable[[], Formatter]] = {
    "s": lambda: EngFormatter(unit="s"),
    "bytes": lambda: EngFormatter(unit="B"),
    "percentunit": lambda: PercentFormatter(1.0),
    "reqps": lambda: StrMethodFormatter("{x:g} req/s"),
    "short": lambda: StrMethodFormatter("{x:g}"),
    "none": lambda: StrMethodFormatter("{x:g}"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.pictures", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="seconds of load (default: 240)")
    parser.add_argument("--model", default="default", help="model folder, 'default', or 'tiny' (default: default)")
    parser.add_argument("--threads", type=int, help="threads of the model (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures (default: docs/images)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, pictures() as address:
        settings = Settings.model_validate(
            {"model": str(model_folder(options.model)), "num_threads": options.threads, **_fetching(address)}
        )
        with (
            running(settings) as target,
            scraping(f"{target.host}:{target.port}", Path(folder), SCRAPE_SECONDS) as prometheus,
        ):
            began = time.time()
            load(target, options.seconds, address)
            draw(prometheus, began, time.time(), options.out)
    return 0


def _fetching(address: str) -> dict[str, Any]:
    host, _, port = address.partition(":")
    networks = {"media_url_http": True, "media_url_networks": "127.0.0.0/8"}
    return {"media_url_hosts": host, "media_url_ports": port, **networks}


@contextmanager
def pictures() -> Iterator[str]:
    """Serve a different picture for each path, so that some media are fetched by URL; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = jpeg(int(self.path.rpartition("/")[2]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def load(target: Target, seconds: float, address: str) -> None:
    """Send mixed requests, with as many clients at a time as `CLIENTS` says for each part of the time."""
    mixture.prepare(target)
    end = time.monotonic() + seconds
    for number, num_clients in enumerate(CLIENTS, start=1):
        until = end - seconds * (1 - number / len(CLIENTS))
        clients = [
            threading.Thread(target=_run_client, args=(target, until, address, 100 * number + client))
            for client in range(num_clients)
        ]
        for client in clients:
            client.start()
        for _ in range(3):  # for the panel of refusals
            target.send(text_request(n=0))
            time.sleep(2 * SCRAPE_SECONDS)
        for client in clients:
            client.join()


def _run_client(target: Target, until: float, address: str, seed: int) -> None:
    rng = random.Random(seed)
    while time.monotonic() < until:
        kind = rng.random()
        if kind < REFUSED:
            target.send(text_request(n=0))
        elif kind < REFUSED + FETCHING:
            picture = {"type": "image_url", "image_url": {"url": f"http://{address}/{rng.randrange(10_000)}"}}
            target.send(text_request(prompt=[picture, {"type": "text", "text": " A picture of"}]))
        else:
            target.send(mixture.draw(rng)[1])


def draw(prometheus: Prometheus, start: float, end: float, folder: Path) -> list[Path]:
    """Draw all panels over a time, and return the files."""
    matplotlib.use("agg")
    with matplotlib.rc_context(STYLE):
        return [_draw_section(prometheus, title, panels, (start, end), folder) for title, panels in sections()]


def _draw_section(
    prometheus: Prometheus, title: str, panels: Sequence[Panel], times: tuple[float, float], folder: Path
) -> Path:
    top = min(panel.y for panel in panels)
    num_rows = max(panel.y + panel.height for panel in panels) - top
    figure = pyplot.figure(figsize=(COLUMNS * COLUMN_INCHES, num_rows * ROW_INCHES), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(num_rows, COLUMNS)
    for panel in panels:
        y = panel.y - top
        axes = figure.add_subplot(grid[y : y + panel.height, panel.x : panel.x + panel.width])
        _draw_panel(axes, prometheus, panel, times)
    return _save(figure, folder / file_name(title))


def file_name(title: str) -> str:
    """Return the name of the picture of a row with this title."""
    return f"dashboard-{title.lower().replace(' ', '-')}.png"


def _draw_panel(axes: Axes, prometheus: Prometheus, panel: Panel, times: tuple[float, float]) -> None:
    start, end = times
    for query in panel.queries:
        expression = query.with_variables(RATE_INTERVAL)
        for series in prometheus.query_range(expression, start, end, (end - start) / NUM_POINTS):
            seconds, values = zip(*((when - start, float(value)) for when, value in series["values"]), strict=True)
            axes.plot(seconds, values, linewidth=1.2, label=query.label(series["metric"]))
    axes.set_title(textwrap.fill(panel.title, TITLE_LETTERS))
    axes.set_xlim(0, end - start)
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
    axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
    axes.yaxis.set_major_formatter(FORMATS[panel.unit]())
    if axes.lines:
        axes.legend(fontsize=7, loc="upper left", framealpha=0.6)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")


def _save(figure: Figure, file: Path) -> Path:
    """Save a figure with few colours, which halves the file."""
    figure.savefig(file)
    pyplot.close(figure)
    with Image.open(file) as image:
        image.convert("RGB").quantize(NUM_COLOURS).save(file, optimize=True)
    return file


if __name__ == "__main__":
    raise SystemExit(main())
