"""The parts of a prompt in responses."""

from __future__ import annotations

import pytest

from server.schemas.prompt import stored_media_fields, stored_media_part


@pytest.mark.parametrize("media_id", ["img_" + 64 * "0", "vid_" + 64 * "f"])
def test_the_fields_of_stored_media_are_those_of_the_part(media_id: str) -> None:
    assert stored_media_fields(media_id) == stored_media_part(media_id).model_dump(mode="json")
