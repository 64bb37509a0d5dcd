"""What the finished files of a stage hold: users, texts and tokens, counted as the files appear."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


class WorkDone:
    """Counts of all units in a folder of a pool's results; every file is read once, and of it little more than its footer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[str] = set()
        self.total: Counter[str] = Counter()

    def count(self) -> Counter[str]:
        """Users, texts (rows that belong to a user) and tokens up to now; nothing of what the files do not hold."""
        for path in sorted(self.folder.glob("*.parquet")):
            if path.name not in self.seen:
                self.total.update(_counts(path))
                self.seen.add(path.name)
        return Counter(self.total)


def _counts(path: Path) -> dict[str, int]:
    try:
        footer = pq.read_metadata(path)
        if "user_id" not in footer.schema.names:
            return {}
        users = pc.count_distinct(pq.read_table(path, columns=["user_id"])["user_id"]).as_py()
    except (pa.ArrowException, OSError):  # whoever needs the file will complain of it
        return {}
    chunks = [footer.row_group(group).column(column) for group in range(footer.num_row_groups) for column in range(footer.num_columns)]
    tokens = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.startswith("token_ids."))
    return {"users": users, "texts": footer.num_rows, "tokens": tokens}
