"""An upload's body in whichever of its three forms: the bytes themselves, a form with a file, or JSON that holds them.

What the bytes are is told by the bytes; a Content-Type that says otherwise is refused. They are not decoded here.
"""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from model.media import MediaError, media_type_of
from server.api.body import read_body, stream_body
from server.errors import InvalidMedia, InvalidRequest, UnsupportedMediaType, UnsupportedParameter
from server.media.intake import Intake
from server.media.source import EncodedMedia, Kind, check_size, encoded, from_base64
from server.schemas.base import read
from server.schemas.images import UploadRequest
from server.settings import Settings

FORM = "multipart/form-data"
FORM_FIELD = "file"
RAW = ("image/", "video/", "application/octet-stream")


async def read_upload(request: Request, settings: Settings, intake: Intake) -> EncodedMedia:
    """Raises `InvalidRequest`."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        return await _from_json(await read_body(request, settings), settings, intake)
    if content_type == FORM:
        data, content_type = await _from_form(request, settings)
        return _media(data, content_type, settings, FORM_FIELD)
    if content_type.startswith(RAW):
        return _media(await read_body(request, settings), content_type, settings, "body")
    message = f"a body of type {content_type[:64]!r}: send image/..., video/..., application/json or {FORM}"
    raise UnsupportedMediaType(message, param="Content-Type")


async def _from_json(body: bytes, settings: Settings, intake: Intake) -> EncodedMedia:
    fields = read(UploadRequest, body)
    if fields.data is not None:
        return _media(from_base64(fields.data, settings.max_media_bytes, "data"), "", settings, "data")
    assert fields.url is not None
    kind: Kind = "video" if fields.url.lower().startswith("data:video/") else fields.object
    return await intake.read_url(fields.url, kind, "url")


async def _from_form(request: Request, settings: Settings) -> tuple[bytes, str]:
    """The file's bytes and what the form calls their type."""
    parser = MultiPartParser(request.headers, stream_body(request, settings), max_files=1, max_fields=1)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"the body is no form with a file: {error.message}", param=FORM_FIELD) from None
    try:
        if unknown := next((name for name in form if name != FORM_FIELD), None):
            raise UnsupportedParameter(f"unknown parameter {unknown[:64]}", param=unknown[:64])
        file = form.get(FORM_FIELD)
        if not isinstance(file, UploadFile):
            raise InvalidRequest(f"the form has no file under the name {FORM_FIELD}", param=FORM_FIELD)
        return await file.read(), (file.content_type or "").partition(";")[0].strip().lower()
    finally:
        await form.close()


def _media(data: bytes, content_type: str, settings: Settings, param: str) -> EncodedMedia:
    check_size(len(data), settings.max_media_bytes, param)
    try:
        found = media_type_of(data)
    except MediaError as error:
        raise InvalidMedia(str(error), param=param) from None
    kind: Kind = "image" if found.startswith("image/") else "video"
    if content_type not in ("", "application/octet-stream") and not content_type.startswith(f"{kind}/"):
        raise InvalidMedia(f"the bytes are {found}, and were sent as {content_type[:64]}", param=param)
    return encoded(data, kind, param)
