"""Uploaded tables: kept with the runs, under a name that their content decides."""

import hashlib
import re
from pathlib import Path

from nicegui.elements.upload_files import FileUpload


async def keep_upload(file: FileUpload, root: Path) -> str:
    """Write the file under root/.panel/data and return its absolute path.

    Another file of the same name gets another path: a run finds its own table when it is resumed.
    """
    content = await file.read()
    stem = re.sub(r"[^\w-]", "_", Path(file.name).stem)[:80] or "data"
    digest = hashlib.sha256(content).hexdigest()[:8]
    place = (root / ".panel" / "data" / f"{stem}-{digest}.csv").resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return str(place)
