"""Who calls: accounts, and tokens that are kept as hashes alone."""

import base64
import hashlib
import re
import secrets

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.records import Account, Secret, Token

RESERVED = {"local", "replicate", "ostris", "black-forest-labs", "lucataco"}
"""Owners of the server's own models and of the names that stand for them."""


def new_id() -> str:
    """26 letters and digits with 128 random bits, as Replicate's ids look."""
    return base64.b32encode(secrets.token_bytes(16)).decode().lower().rstrip("=")


def is_id(text: str) -> bool:
    return re.fullmatch(r"[a-z2-7]{26}", text) is not None


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


async def create(session: AsyncSession, name: str) -> Account:
    """The account of that name, made where there is none. Raises ValueError for a name that cannot own models."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name) or name in RESERVED:
        raise ValueError(
            f"{name[:80]!r} cannot be an account: lower-case letters, digits, '-', '_' and '.', none reserved"
        )
    found = await session.scalar(select(Account).where(Account.name == name))
    if found is None:
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        found = Account(name=name, webhook_secret=f"whsec_{key}")
        session.add(found)
        await session.flush()
    return found


async def new_token(session: AsyncSession, account: Account) -> str:
    """A token of that account: told this once."""
    token = f"r8_{secrets.token_hex(20)}"
    session.add(Token(digest=digest(token), account_id=account.id, hint=token[:7]))
    return token


async def revoke(session: AsyncSession, token: str) -> int:
    """Revokes this token, or all that begin with these seven characters; returns how many."""
    meant = Token.digest == digest(token) if re.fullmatch(r"r8_[0-9a-f]{40}", token) else Token.hint == token[:7]
    chosen = update(Token).where(meant, Token.revoked_at.is_(None)).values(revoked_at=func.now())
    return len((await session.scalars(chosen.returning(Token.digest))).all())


async def of_token(session: AsyncSession, digest: str) -> Account | None:
    """The account of the token with this hash, unless it is revoked."""
    return await session.scalar(select(Account).join(Token).where(Token.digest == digest, Token.revoked_at.is_(None)))


async def link_key(session: AsyncSession) -> bytes:
    """The key that signs links: one for all machines, made by the first."""
    from sqlalchemy.dialects.postgresql import insert

    fresh = insert(Secret).values(name="links", value=secrets.token_hex(32)).on_conflict_do_nothing()
    await session.execute(fresh)
    value = await session.scalar(select(Secret.value).where(Secret.name == "links"))
    assert value is not None
    return bytes.fromhex(value)
