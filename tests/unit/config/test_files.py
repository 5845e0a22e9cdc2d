import errno
import hashlib

import pytest

from distcl.config.files import file_digest, write_atomically


@pytest.mark.parametrize("content", ["new", b"new", lambda part: part.write_text("new")])
@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path, content, sync):
    path = tmp_path / "a.json"
    path.write_text("old")
    write_atomically(path, content, sync)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(part):
        part.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"\0" * 3_000_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"\0" * 3_000_000).hexdigest()
