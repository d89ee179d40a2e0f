"""Media settings: closed by default, and wrong entries are refused when they are made."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from loramux.config import MediaConfig


def test_nothing_is_read_from_elsewhere_by_default() -> None:
    config = MediaConfig()
    assert config.allowed_media_domains == [] and config.allowed_media_roots == []


def test_every_setting_is_described() -> None:
    assert all(field.description for field in MediaConfig.model_fields.values())


@pytest.mark.parametrize(
    "domain",
    [
        "http://a.test",
        "a.test/x",
        "",
        "a..b",
        "a b",
        "*.a.test",
        "..a",
        "a.test:",
        "user@a.test",
        "[::1]",
    ],
)
def test_what_is_no_domain(domain: str) -> None:
    with pytest.raises(ValidationError, match="allowed_media_domains"):
        MediaConfig(allowed_media_domains=["good.test", domain])


def test_domains_are_lower_case() -> None:
    config = MediaConfig(allowed_media_domains=["CDN.Test", ".Example.com:8443", "*", "10.0.0.1"])
    assert config.allowed_media_domains == ["cdn.test", ".example.com:8443", "*", "10.0.0.1"]


@pytest.mark.parametrize("root", ["", "media", "~/media", "/a\0b"])
def test_what_is_no_root(root: str) -> None:
    with pytest.raises(ValidationError, match="allowed_media_roots"):
        MediaConfig(allowed_media_roots=[root])


def test_counts_that_are_left_out_keep_their_default() -> None:
    assert MediaConfig(max_items_per_request={"image": 2}).max_items_per_request == {
        "image": 2,
        "audio": 4,
        "video": 1,
    }
    defaults = MediaConfig().max_items_per_request
    defaults["image"] = 100
    assert MediaConfig().max_items_per_request["image"] == 8


def test_vllms_names_and_shapes() -> None:
    config = MediaConfig(
        limit_mm_per_prompt={"audio": 0},
        allowed_local_media_path="/media",
        allowed_media_domains=None,
    )
    assert config == MediaConfig(
        max_items_per_request={"audio": 0}, allowed_media_roots=["/media"], allowed_media_domains=[]
    )
    assert MediaConfig(allowed_local_media_path="") == MediaConfig()
    with pytest.raises(ValidationError, match="are one setting"):
        MediaConfig(allowed_local_media_path="/a", allowed_media_roots=["/b"])


@pytest.mark.parametrize("counts", [{"image": -1}, {"smell": 1}, {"image": "many"}, 3])
def test_what_are_no_counts(counts: object) -> None:
    with pytest.raises(ValidationError, match="max_items_per_request"):
        MediaConfig(max_items_per_request=counts)  # type: ignore[arg-type]


def test_no_more_pixels_than_pillow_decodes_silently() -> None:
    import PIL.Image

    most = PIL.Image.MAX_IMAGE_PIXELS
    assert most is not None
    assert MediaConfig(max_image_pixels=most).max_image_pixels == most
    with pytest.raises(ValidationError, match="max_image_pixels"):
        MediaConfig(max_image_pixels=most + 1)
