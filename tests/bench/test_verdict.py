"""What `script/bench verdict` says of the trainings that stand in the repository."""

import json
import re
from pathlib import Path

from bench import verdict

ROOT = Path(__file__).parent.parent.parent


def test_the_page_on_quality_tells_what_the_command_prints() -> None:
    page = " ".join((ROOT / "docs" / "quality.md").read_text(encoding="utf-8").split())
    lines = [json.loads(line) for line in (ROOT / "bench" / "verdict.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = re.findall(r"-?\d\.\d\d", verdict.told(lines))
    assert len(figures) == 18
    assert [figure for figure in figures if figure not in page] == []
    assert verdict.warned(lines).splitlines() == [
        "warned of other words: 15 trainings, 13 show it under them in 0.47 or more; not warned: 47, 5 do",
        "warned of no gain: 3 trainings, which keep 0.125 of the base's things at most",
    ]
    assert "(15 trainings), 13 show it" in page
    assert "of the 47 others with a gain, five do" in page
    assert "keeps .125 of the base's things at most" in page
