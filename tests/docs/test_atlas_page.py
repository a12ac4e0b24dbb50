"""The atlas on the built site, opened from the disk and clicked through in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DATA = Path(__file__).parents[2] / "bench" / "results" / "memory-atlas.json"
# Chooses and clicks, and leaves in the page what it saw.
DRIVER = """
<script>
const seen = {errors: []};
addEventListener("error", (event) => seen.errors.push(event.message));
function see(name) {
  const rows = [...document.querySelectorAll("#atlas tbody tr")];
  seen[name] = {
    settings: rows.map((row) => row.querySelector("th").textContent),
    cells: rows.map((row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent)),
    cards: [...document.querySelectorAll("#atlas thead th")].slice(1).map((card) => card.firstChild.textContent),
    offered: [...document.querySelector("#atlas-size").options].map((option) => option.value),
    told: document.querySelector("#atlas [role=status]").textContent,
    hash: location.hash,
    wide: document.documentElement.scrollWidth - innerWidth,
    ink: getComputedStyle(document.querySelector("#atlas tbody th")).color,
    paper: getComputedStyle(document.querySelector("#atlas tbody th")).backgroundColor,
  };
}
function choose(name, value) {
  const select = document.querySelector(`#atlas-${name}`);
  select.value = value;
  select.dispatchEvent(new Event("change", {bubbles: true}));
}
addEventListener("load", () => {
  see("first");
  choose("model", MODEL);
  see("model");
  choose("card", CARD);
  choose("fits", "yes");
  see("fits");
  document.querySelector("#atlas tbody button").click();
  see("told");
  const found = document.createElement("pre");
  found.id = "driven";
  found.textContent = JSON.stringify(seen);
  document.body.append(found);
});
</script>
"""
MODEL, CARD, SIZE = "flux-dev", "4090", "24 GB"


def opened(site: Path, folder: Path, *options: str, address: str = "") -> dict[str, Any]:
    """What the driver saw."""
    page = site / "atlas-driven.html"
    driver = DRIVER.replace("MODEL", json.dumps(MODEL)).replace("CARD", json.dumps(CARD))
    text = (site / "atlas.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", driver + "</body>"), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", *options]
    command += ["--virtual-time-budget=4000", "--dump-dom", f"file://{page}{address}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = re.search(r'<pre id="driven">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
def test_the_atlas_is_clicked_through(site: Path, tmp_path: Path) -> None:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    seen = opened(site, tmp_path / "wide", "--window-size=1280,900")
    assert seen["errors"] == []
    first, chosen, fitting, told = (seen[name] for name in ("first", "model", "fits", "told"))
    assert len(first["settings"]) == len(data["rows"]) and first["hash"] == ""
    assert first["cards"] == [card["size"] for card in data["cards"]]

    mine = [row for row in data["rows"] if row["model"] == MODEL]
    assert len(chosen["settings"]) == len(mine) and all(text.startswith(MODEL) for text in chosen["settings"])
    assert chosen["offered"] == ["any", *dict.fromkeys(f"{row['height']} x {row['width']}" for row in mine)]

    there = [row for row in mine if row["answers"][CARD][0] == "yes"]
    assert 0 < len(fitting["settings"]) == len(there) < len(mine) and fitting["cards"] == [SIZE]
    assert all(len(cells) == 1 and cells[0] for cells in fitting["cells"])
    assert fitting["hash"] == f"#model={MODEL}&card={CARD}&fits=yes" and fitting["told"] == "Choose a cell."

    state, spare, _, policy, away, peak = there[0]["answers"][CARD]
    shown = re.search(r"Fits with ([\d.]+) GiB to spare", told["told"])
    # Shown in tenths.
    assert state == "yes" and shown is not None and abs(float(shown[1]) - spare) < 0.051
    command = " ".join(filter(None, [there[0]["command"], there[0]["away"][away][1], f"--card {CARD}"]))
    for part in (policy, peak, command, there[0]["away"][away][0]):
        assert part in told["told"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
def test_the_atlas_on_a_phone_in_the_dark_from_a_link(site: Path, tmp_path: Path) -> None:
    dark = ("--blink-settings=preferredColorScheme=0", "--window-size=500,900")
    seen = opened(site, tmp_path / "narrow", *dark, address=f"#model={MODEL}&card={CARD}&size=nonsense")
    assert seen["errors"] == []
    first = seen["first"]
    assert first["cards"] == [SIZE] and all(text.startswith(MODEL) for text in first["settings"])
    assert seen["model"]["wide"] <= 0, "the page itself is no wider than the window"
    ink, paper = (sum(map(float, re.findall(r"[\d.]+", first[name])[:3])) for name in ("ink", "paper"))
    assert ink > paper
