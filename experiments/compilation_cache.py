"""Where the scripts keep compiled programs, so that the next run with the same shapes does not compile them again."""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro


def default_folder() -> Path:
    """JAX's own folder if the environment names one (`JAX_COMPILATION_CACHE_DIR`), else one in the user's cache."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "a3c_jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilationCache:
    """Where compiled programs are kept."""

    compilation_cache: Path = dataclasses.field(default_factory=default_folder)
    """Folder that keeps compiled programs, so that the next run with the same shapes starts faster. It can be deleted at any time."""
    no_compilation_cache: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile everything again, and keep nothing."""

    def use(self) -> Path | None:
        """Makes JAX keep what it compiles. Call it before anything is compiled.

        Returns:
          The folder; None if nothing is kept, because that was asked for or because the folder cannot be written,
          which is said in a warning.
        """
        folder = None if self.no_compilation_cache else _writable(self.compilation_cache)
        keep_compiled_programs(folder)
        return folder


def keep_compiled_programs(folder: Path | None) -> None:
    """Makes JAX keep what it compiles in a folder; None makes it keep nothing."""
    import jax

    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run compiles a dozen small programs. Together they take as long as a large one.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _writable(folder: Path) -> Path | None:
    """The absolute path of a folder, which is made if it does not exist; None, and a warning, if it cannot be written."""
    folder = folder.expanduser().absolute()
    try:
        # Whoever can write into it could have this process run what they like.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        print(
            f"warning: compilation_cache must be a folder that can be written, got {folder} ({error.strerror}); "
            "compiled programs are not kept. Give another folder, or --no-compilation-cache.",
            file=sys.stderr,
        )
        return None
