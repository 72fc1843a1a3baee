"""Images of a request: out of data: URLs, and, only where the operator allows it, from public addresses.

A fetched address is resolved once, every address it has must be public, and the connection goes to exactly
the one that was checked: a name that answers differently the second time gains nothing. Redirects are not
followed, proxies of the environment are not used.
"""

import base64
import binascii
import io
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

import anyio

from guard.service.errors import Refused
from guard.service.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
PORTS = (80, 443)
FETCH_SECONDS = 10.0
_DATA = re.compile(r"data:image/[A-Za-z0-9.+-]{1,40}(?P<parameters>(;[^,;]{0,80})*),", re.IGNORECASE)

Resolve = Callable[[str, int], Awaitable[list[str]]]


def _bad(message: str, code: str = "invalid_image", status: int = 400) -> Refused:
    return Refused(message, "input", code, status)


async def load(url: str, limits: Limits, fetch: bool, resolve: "Resolve | None" = None) -> bytes:
    """Encoded bytes of an image, checked; raises `Refused` with what is wrong, never with the address."""
    if url[:5].lower() == "data:":
        content = decode(url, limits)
    elif not fetch:
        raise _bad("image addresses are not fetched here: send the image as a data: URL", "unsupported_input")
    else:
        content = await download(url, limits, resolve or lookup)
    await anyio.to_thread.run_sync(check, content, limits)
    return content


def decode(url: str, limits: Limits) -> bytes:
    """The bytes in a data: URL."""
    match = _DATA.match(url)
    if match is None:
        raise _bad("an image URL must begin with data:image/")
    rest = url[match.end() :]
    if len(rest) > limits.image_bytes * 3 + 16:  # the longest spelling, three characters a byte
        raise _too_large(limits)
    if match["parameters"].lower().endswith(";base64"):
        try:
            content = base64.b64decode(unquote_to_bytes(rest) if "%" in rest else rest, validate=True)
        except (binascii.Error, ValueError):
            raise _bad("the image's base64 is not valid") from None
    else:
        content = unquote_to_bytes(rest)
    if len(content) > limits.image_bytes:
        raise _too_large(limits)
    return content


def _too_large(limits: Limits) -> Refused:
    return _bad(f"an image is longer than {limits.image_bytes} bytes", "image_too_large", 413)


def check(content: bytes, limits: Limits) -> None:
    """Refuse what is no image, or one of too many pixels, before anything decodes it."""
    from PIL import Image, UnidentifiedImageError

    moving = False
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels = image.width * image.height
            # A photo may carry further pictures of the same scene (JPEG); an animation shows them in turn.
            moving = image.format != "JPEG" and getattr(image, "n_frames", 1) > 1
            if pixels <= limits.image_pixels and not moving:
                image.load()
    except Image.DecompressionBombError:
        pixels = limits.image_pixels + 1
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError):
        raise _bad(f"not a readable image; known are {', '.join(FORMATS)}") from None
    if moving:
        # Only the first picture would be judged, and people would be shown the others.
        raise _bad("an image holds more than one picture: send each of them as an image")
    if pixels > limits.image_pixels:
        raise _bad(f"an image has more than {limits.image_pixels} pixels", "image_too_large", 413)


async def lookup(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(sockaddr[0]) for *_, sockaddr in found]


def public(address: str) -> bool:
    """Whether an address is one of the public internet, also where IPv6 wraps an IPv4 address."""
    try:
        found = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if wrapped is None and found in _TRANSLATED:
            wrapped = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if wrapped is not None:
            return public(str(wrapped))
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64, RFC 6052


async def download(url: str, limits: Limits, resolve: Resolve = lookup) -> bytes:
    """The bytes behind a public http(s) address."""
    parts, host, port = _address(url)
    with anyio.move_on_after(FETCH_SECONDS):
        addresses = await resolve(host, port)
        if not addresses or not all(map(public, addresses)):
            # One message for both: who asks learns nothing about names inside.
            raise _bad("the image's address is not reachable from here", "image_unreachable")
        return await _get(parts, host, port, addresses[0], limits)
    raise _bad(f"the image did not arrive within {FETCH_SECONDS:.0f} s", "image_unreachable")


def _address(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        host.encode("idna")
        parts.path.encode("ascii"), parts.query.encode("ascii")
    except (ValueError, UnicodeError):
        raise _bad("the image's address is malformed") from None
    if parts.scheme not in ("http", "https") or not host or port not in PORTS or parts.username is not None:
        raise _bad("an image's address must be http(s), on its usual port, without a user name")
    if any(c.isspace() or ord(c) < 32 for c in url):
        raise _bad("the image's address is malformed")
    return parts, host, port


async def _get(parts: SplitResult, host: str, port: int, address: str, limits: Limits) -> bytes:
    """One request to the one address that was checked, under the name that was asked for."""
    import httpx2

    shown = f"[{address}]" if ":" in address else address
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # Compressed answers could grow beyond their length: none is asked for, and none is unpacked.
    headers = {"host": parts.netloc, "accept": "image/*", "accept-encoding": "identity"}
    content = bytearray()
    try:
        async with (
            httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=FETCH_SECONDS) as client,
            client.stream(
                "GET",
                f"{parts.scheme}://{shown}:{port}{target}",
                headers=headers,
                extensions={"sni_hostname": host},
            ) as response,
        ):
            if response.status_code != 200:
                raise _bad(
                    "the image's address gave no image (redirects are not followed)", "image_unreachable"
                )
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limits.image_bytes:
                    raise _too_large(limits)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError):
        raise _bad("the image's address is not reachable from here", "image_unreachable") from None
    return bytes(content)
