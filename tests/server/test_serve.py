"""The command line's parts: settings that cannot be, options that are handed on, tokens that are revoked, an end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select

from server import accounts, database, postgres, serve, settings
from server.api import usage
from server.records import Token
from tests.server.conftest import ROOT, Served, free_port


@pytest.mark.parametrize("name", ["REQUESTS_A_MINUTE", "OPEN_JOBS", "ATTEMPTS", "LOST_SECONDS"])
def test_a_limit_that_would_stop_everything_is_refused(name: str) -> None:
    assert settings.read({name: "7"})
    with pytest.raises(ValueError, match=f"{name}='0' must be a number from"):
        settings.read({name: "0"})


def test_a_certificate_may_hold_its_key() -> None:
    arguments = serve._parser().parse_args(["--port", "1", "--certificate", "both.pem"])
    assert serve._where(arguments) == ["--host", arguments.host, "--port", "1", "--certificate", "both.pem"]


def test_temporary_files_lie_beside_the_servers_own_and_a_killed_ones_are_deleted(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder = tmp_path / "data" / "tmp"
    (folder / "export-of-a-killed-one").mkdir(parents=True)
    serve._keep_temporary_files(folder)
    assert list(folder.iterdir()) == []
    with tempfile.NamedTemporaryFile() as made:
        assert Path(made.name).parent == folder
    assert [path.name for path in (served.data / "tmp").iterdir()] == [served.url.rpartition(":")[2]]


@pytest.mark.slow
def test_a_command_leaves_no_database_running_that_did_not_run_before() -> None:
    # Not in pytest's own folder: started by root, PostgreSQL runs as another user.
    with tempfile.TemporaryDirectory(prefix="flux-token-", ignore_cleanup_errors=True) as folder:
        environ = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        made = subprocess.run(
            [str(ROOT / "script" / "serve"), "token"],
            env=environ | {"SERVER_DATA": folder},
            capture_output=True,
            text=True,
            check=True,
        )
        assert made.stdout.startswith("r8_")
        assert not postgres.is_running(Path(folder) / "postgres")


def test_a_second_server_in_the_same_folder_is_refused(served: Served) -> None:
    command = [str(ROOT / "script" / "serve"), "--port", str(free_port())]
    asked = subprocess.run(command, env=served.environ, capture_output=True, text=True, timeout=60, check=False)
    assert asked.returncode == 1
    assert "another script/serve is at work in SERVER_DATA=" in asked.stderr


def test_a_database_that_does_not_answer_is_told_in_a_line() -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        address = f"postgresql://flux:secretword@127.0.0.1:{nobody.getsockname()[1]}/flux"
        asked = subprocess.run(
            [str(ROOT / "script" / "serve"), "worker"],
            env=os.environ | {"DATABASE_URL": address},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert asked.returncode == 1
    assert asked.stderr.startswith("script/serve: the database of DATABASE_URL does not answer: ")
    assert len(asked.stderr.splitlines()) == 1
    assert "secretword" not in asked.stderr


def test_a_moment_without_a_zone_is_utc() -> None:
    assert usage._with_zone(datetime(2026, 1, 31)) == datetime(2026, 1, 31, tzinfo=UTC)


def test_a_whole_token_is_revoked_alone(served: Served) -> None:
    async def revoke() -> None:
        url = served.database.replace("postgresql://", "postgresql+psycopg://")
        async with database.connected(url, 1) as sessions, sessions() as session:
            account = await accounts.create(session, "revoked")
            tokens = [f"r8_abcd{number:036x}" for number in range(3)]
            for token in tokens:
                session.add(Token(digest=accounts.digest(token), account_id=account.id, hint=token[:7]))
            await session.flush()
            assert await accounts.revoke(session, tokens[1]) == 1
            left = select(Token.digest).where(Token.account_id == account.id, Token.revoked_at.is_(None))
            assert set((await session.scalars(left)).all()) == {accounts.digest(tokens[0]), accounts.digest(tokens[2])}
            assert await accounts.revoke(session, "r8_abcd") == 2
            await session.rollback()

    asyncio.run(revoke())


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
SUPERVISOR = """
import os, sys
from server import supervisor
supervisor.SECONDS_TO_STOP = 0.5
supervisor.run({"stubborn": [sys.executable, "-c", *sys.argv[1:]]}, os.environ, {}, None)
"""


def test_a_process_that_does_not_stop_is_killed_and_not_left_behind(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    running = subprocess.Popen([sys.executable, "-c", SUPERVISOR, STUBBORN, str(told)], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stubborn = psutil.Process(int(told.read_text()))
    running.send_signal(signal.SIGTERM)
    running.wait(10)
    try:
        stubborn.wait(2)
    except psutil.TimeoutExpired:
        os.kill(stubborn.pid, signal.SIGKILL)
        raise
