"""Files that are complete or absent: atomic writes, manifests with checksums, folder locks."""

from factorlm.storage.atomic import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    remove_folder,
    remove_leftovers,
    require_free_space,
    storage_errors,
)
from factorlm.storage.cache import cache_folder
from factorlm.storage.lock import LOCK_FILE, folder_lock
from factorlm.storage.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    describe_file,
    read_manifest,
    read_sealed_json,
    verify,
    write_manifest,
    write_sealed_json,
)

__all__ = [
    "LOCK_FILE",
    "MANIFEST_FILE",
    "FileEntry",
    "Manifest",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "cache_folder",
    "describe_file",
    "folder_lock",
    "read_manifest",
    "read_sealed_json",
    "remove_folder",
    "remove_leftovers",
    "require_free_space",
    "storage_errors",
    "verify",
    "write_manifest",
    "write_sealed_json",
]
