"""Guardrails: rules of a settings file that a request must keep, and the record of those that did not.

The file is TOML, a list of rules, each with a name and one of these:

    [[rule]]
    name = "no weapons"
    words = ["gun", "rifle"]            # whole words of a prompt, in any case

    [[rule]]
    name = "no card numbers"
    pattern = '\\b\\d{4}( ?\\d{4}){3}\\b'   # a regular expression, found anywhere in a prompt

    [[rule]]
    name = "the checker stays on"
    safety_checker = true               # disable_safety_checker is refused

    [[rule]]
    name = "a day's pictures"
    pictures_a_day = 200                # for a token, over the last 24 hours; also: gpu_seconds_a_day

Not covered: captions within an archive of pictures.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from server.database import Sessions
from server.records import OPEN, Json, Refusal, Run, Use

KINDS = {"words": list, "pattern": str, "safety_checker": bool, "pictures_a_day": int, "gpu_seconds_a_day": int}
TEXTS = re.compile(r"prompt|trigger|prefix|suffix")
"""Inputs whose text is looked at, by name."""


@dataclass(frozen=True)
class Rule:
    name: str
    kind: str
    """One of KINDS."""
    pattern: re.Pattern[str] | None = None
    """Of words and pattern."""
    limit: int = 0
    """Of the quotas."""


class Broken(Exception):
    """A request breaks a rule; the message names it."""

    def __init__(self, rule: Rule, why: str) -> None:
        super().__init__(f"The rule {rule.name!r} of this server refuses it: {why}")
        self.rule = rule
        self.why = why

    @property
    def is_quota(self) -> bool:
        return self.rule.limit > 0


def read(path: Path) -> tuple[Rule, ...]:
    """The rules of a file. Raises ValueError that names the rule and what is wrong with it."""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"GUARDRAILS={path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"GUARDRAILS={path}: is no TOML: {error}") from None
    if told.keys() - {"rule"} or not isinstance(told.get("rule", []), list):
        raise ValueError(f"GUARDRAILS={path}: may hold [[rule]] alone, not {', '.join(sorted(told))[:100]}")
    return tuple(_rule(entry, f"GUARDRAILS={path}: rule {number}") for number, entry in enumerate(told["rule"], 1))


def _rule(entry: Mapping[str, Any], called: str) -> Rule:
    name, kinds = entry.get("name"), [kind for kind in entry if kind != "name"]
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise ValueError(f"{called}: needs a name of 1 to 100 characters")
    if len(kinds) != 1 or kinds[0] not in KINDS or type(entry[kinds[0]]) is not KINDS[kinds[0]]:
        allowed = ", ".join(f"{kind} ({type.__name__})" for kind, type in KINDS.items())
        raise ValueError(f"{called} ({name}): needs exactly one of {allowed} besides its name")
    kind, value = kinds[0], entry[kinds[0]]
    if kind == "words":
        if not value or not all(isinstance(word, str) and word.strip() for word in value):
            raise ValueError(f"{called} ({name}): words must be a list of words")
        value = rf"(?<!\w)({'|'.join(re.escape(word.strip()) for word in value)})(?!\w)"
    if kind in ("words", "pattern"):
        try:
            return Rule(name, kind, re.compile(value, re.IGNORECASE))
        except re.error as error:
            raise ValueError(f"{called} ({name}): is no regular expression: {error}") from None
    if kind == "safety_checker":
        return Rule(name, kind)
    if value < 1:
        raise ValueError(f"{called} ({name}): {kind} must be 1 or more")
    return Rule(name, kind, limit=value)


def said(rules: Sequence[Rule], values: Json) -> None:
    """Raises Broken for what an input says. Needs no database."""
    for rule in rules:
        if rule.pattern is not None:
            for name, words in _texts(values):
                if found := rule.pattern.search(words):
                    raise Broken(rule, f"input.{name} holds {found[0][:60]!r}")
        elif rule.kind == "safety_checker" and values.get("disable_safety_checker"):
            raise Broken(rule, "input.disable_safety_checker must be left out")


def _texts(values: Json) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if TEXTS.search(name) and isinstance(value, str):
            yield name, value


async def check(
    session: AsyncSession, rules: Sequence[Rule], account: int, token: str | None, trains: bool, values: Json
) -> None:
    """Raises Broken for the first rule that the input breaks, quotas last. A quota counts what ended within 24 hours
    and what waits or runs; requests of one token are counted one after the other."""
    said(rules, values)
    quotas = [rule for rule in rules if rule.limit]
    if not quotas:
        return
    await session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:token))"), {"token": token or str(account)})
    whose = (Use.account_id == account, Use.token == token)
    recent = Use.created_at > datetime.now(UTC) - timedelta(days=1)
    sums = select(func.coalesce(func.sum(Use.pictures), 0), func.coalesce(func.sum(Use.gpu_seconds), 0.0))
    pictures, seconds = (await session.execute(sums.where(*whose, recent))).one()
    waiting = select(Run.input).where(
        Run.account_id == account, Run.token == token, Run.status.in_(OPEN), Run.cog == "generator"
    )
    for input in (await session.scalars(waiting)).all():
        pictures += _pictures(input)
    for rule in quotas:
        if rule.kind == "pictures_a_day" and not trains and pictures + _pictures(values) > rule.limit:
            raise Broken(rule, f"{rule.limit} pictures in 24 hours for a token, and {pictures} are drawn or asked for")
        if rule.kind == "gpu_seconds_a_day" and seconds >= rule.limit:
            raise Broken(rule, f"{rule.limit} GPU seconds in 24 hours for a token, and {seconds:.0f} are used")


def _pictures(values: Json) -> int:
    number = values.get("num_outputs")
    return int(number) if isinstance(number, (int, float)) else 1


async def record(sessions: Sessions, account: int, token: str | None, model: str, broken: Broken) -> None:
    """Writes the refusal down, apart from the request's own transaction, of which nothing stays."""
    async with sessions.begin() as session:
        session.add(
            Refusal(account_id=account, token=token, rule=broken.rule.name, detail=broken.why[:200], model=model)
        )
