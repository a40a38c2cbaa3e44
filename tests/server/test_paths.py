from __future__ import annotations

import pytest

from onebase.server.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from onebase.server.paths import Roots


@pytest.fixture
def world(tmp_path):
    """Two roots, a neighbour whose name begins like the first, and symlinks out of it and within it."""
    for name in ("root/inside", "root2", "root-neighbour", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "root/out").symlink_to(tmp_path / "secret")
    (tmp_path / "root/hop").symlink_to("out")
    (tmp_path / "root/within").symlink_to("inside")
    (tmp_path / "root/circle").symlink_to("circle")
    (tmp_path / "alias").symlink_to("root")
    return tmp_path


@pytest.fixture
def roots(world):
    return Roots([world / "root", world / "root2"])


def test_relative_paths_mean_the_first_root_and_absolute_ones_themselves(roots, world):
    assert roots.readable("inside") == world / "root/inside"
    assert roots.readable("not/there/yet") == world / "root/not/there/yet"
    assert roots.readable(str(world / "root2/x")) == world / "root2/x"
    assert roots.readable("inside/../inside") == world / "root/inside"


def test_symlinks_are_followed_first(roots, world):
    assert roots.readable("within") == world / "root/inside"
    assert roots.readable(str(world / "alias/inside")) == world / "root/inside"
    assert Roots([world / "alias"]).readable("inside") == world / "root/inside"


@pytest.mark.parametrize(
    "path", ["../secret", "out", "out/x", "hop", "inside/../../secret", "/", "/etc", "..", "~/x/../../.."]
)
@pytest.mark.parametrize("way", ["readable", "writable"])
def test_what_leads_outside_is_denied(roots, path, way):
    with pytest.raises(PermissionDenied) as caught:
        getattr(roots, way)(path)
    assert (caught.value.reason, caught.value.field) == ("PATH_OUTSIDE_ROOTS", "path")
    assert "secret" not in caught.value.message.replace(repr(path), "")  # where a link leads is not told


def test_a_name_that_begins_like_a_root_is_outside(roots, world):
    with pytest.raises(PermissionDenied):
        roots.readable(str(world / "root-neighbour/x"))


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "circle", "circle/x", "y" * 300])
def test_what_is_no_path_is_refused(roots, path):
    with pytest.raises(InvalidArgument) as caught:
        roots.readable(path)
    assert (caught.value.reason, caught.value.field) == ("BAD_PATH", "path")


def test_without_roots_the_flag_is_named():
    with pytest.raises(FailedPrecondition, match="--root DIR") as caught:
        Roots([]).readable("x")
    assert caught.value.reason == "NO_ROOTS"


@pytest.mark.parametrize("path", [".", "inside/..", "", "../root2"])
def test_a_root_itself_is_never_written(roots, path):
    with pytest.raises((PermissionDenied, InvalidArgument)):
        roots.writable(path)


def test_only_adapters_and_empty_or_new_directories_are_written(roots, world):
    assert roots.writable("inside") == world / "root/inside"
    (world / "root/inside/thesis.txt").write_text("years of work")
    with pytest.raises(FailedPrecondition) as caught:
        roots.writable("inside")
    assert caught.value.reason == "NOT_AN_ADAPTER"
    (world / "root/inside/adapter_config.json").write_text("{}")
    assert roots.writable("inside") == world / "root/inside"
    assert roots.writable("new/one") == world / "root/new/one"
