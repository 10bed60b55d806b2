"""What grading a file gives: the outcome, its lesson, the cases, the points, and the exit code."""

from dataclasses import asdict, dataclass, field
from enum import Enum


class Outcome(str, Enum):
    NOT_STARTED = "not started"
    DOES_NOT_COMPILE = "does not compile"
    CRASHES = "crashes"
    WRONG = "wrong"
    RACES = "races"
    CORRECT = "correct"
    CORRECT_BUT_SLOW = "correct but slow"
    SUSPECT = "suspect"
    BLOCKED = "blocked"

    @property
    def exit_code(self) -> int:
        """0 correct, 1 wrong in any way, 3 not started, 4 blocked. (2 is bad input: a `UserError`.)"""
        good = {Outcome.CORRECT, Outcome.CORRECT_BUT_SLOW}
        return 0 if self in good else {Outcome.NOT_STARTED: 3, Outcome.BLOCKED: 4}.get(self, 1)


@dataclass(frozen=True)
class Lesson:
    """What went wrong, in a sentence that names cause and evidence. `id` is fixed, `text` is for the learner."""

    id: str
    text: str


@dataclass
class CaseResult:
    name: str
    group: str
    passed: bool
    hidden: bool = False
    detail: str = ""  # for a failed case: first differing element, got, expected
    order: str = ""  # the order of execution in which it failed


@dataclass
class Speed:
    """Measured on a GPU only. `share` is of a copy of the same bytes, timed in turn with it in one process."""

    time_us: float
    gb_per_s: float
    copy_gb_per_s: float
    share: float
    device: str
    form: str = "graph"  # in a CUDA graph; or call after call between two `events`; or the `wall` time of the call
    single_launch_us: float = 0.0
    peers: dict[str, float] = field(default_factory=dict)  # name -> GB/s, the same accounting
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> why it was not timed


@dataclass
class Report:
    lab: str
    file: str
    outcome: Outcome
    lesson: Lesson | None = None
    cases: list[CaseResult] = field(default_factory=list)
    points: dict[str, tuple[float, float]] = field(default_factory=dict)  # group -> (earned, of)
    speed: Speed | None = None
    notes: list[str] = field(default_factory=list)
    hint: str = ""
    machine: str = ""  # where the cases ran

    @property
    def earned(self) -> float:
        return sum(earned for earned, _ in self.points.values())

    @property
    def possible(self) -> float:
        return sum(of for _, of in self.points.values())

    def as_dict(self) -> dict:
        table = asdict(self)
        table["outcome"] = self.outcome.value
        return table | {"earned": round(self.earned, 2), "possible": round(self.possible, 2)}
