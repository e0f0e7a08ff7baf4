"""Which exchanges are asked for: by project, agent, time, file, room and tool."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.data.records import parse_time
from workbench.errors import InputError

#: How a time must look, in words for whoever gave another one.
NO_TIME = "no time from 1971 to 2199; write it as 2026-01-31 or 2026-01-31T09:30:00Z"


@dataclass(frozen=True, slots=True)
class Filters:
    """None = all. Names are matched by any part of them, in any case.

    Args:
        since, until: ISO 8601; a date means its first moment (UTC); until is exclusive. An exchange whose log has no
            times passes neither.
        file: a part of the path of a file that the exchange touched.
        room: id, key or label of a room that a memory of the exchange is in.
        tool: the whole name of a tool that was called, in any case.
    """

    project: str | None = None
    agent: str | None = None
    since: str | None = None
    until: str | None = None
    file: str | None = None
    room: str | None = None
    tool: str | None = None

    def sql(self) -> tuple[str, list[str | int]]:
        """A condition over exchanges e and conversations c, with its values; ("true", []) if everything passes.

        Raises: InputError for a time that is none.
        """
        where: list[str] = []
        values: list[str | int] = []
        for column, value in (("c.project", self.project), ("c.agent", self.agent)):
            if value:
                where.append(f"contains(lower({column}), lower(?))")
                values.append(value)
        for name, operator, value in (("since", ">=", self.since), ("until", "<", self.until)):
            if value:
                moment = parse_time(value)
                if moment is None:
                    raise InputError(f"{name}: {value!r} is {NO_TIME}.")
                where.append(f"e.started_at {operator} make_timestamptz(?::BIGINT)")
                values.append(moment)
        if self.file:
            paths = """from_json(e.files, '[{"path":"VARCHAR"}]')"""
            where.append(f"len(list_filter({paths}, lambda f: contains(lower(f.path), lower(?)))) > 0")
            values.append(self.file)
        if self.tool:
            where.append("list_contains(list_transform(e.tools, lambda name: lower(name)), lower(?))")
            values.append(self.tool)
        if self.room:
            from workbench.memory.rooms import concept_key  # most searches name no room

            where.append(
                "e.exchange_id IN (SELECT m.exchange_id FROM memories m JOIN memory_rooms USING (memory_id) "
                "JOIN rooms r USING (room_id) WHERE r.room_id = ? OR r.room_key IN (?, ?) OR lower(r.label) = lower(?))"
            )
            values += [self.room, self.room, concept_key(self.room), self.room]
        return " AND ".join(where) or "true", values
