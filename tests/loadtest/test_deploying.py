import math

from loadtest.deploying import Asked, lives, p99_ms
from service.http.operator_schemas import AuditLine


def line(at: float, action: str, subject: str, after: str | None) -> AuditLine:
    return AuditLine(
        generation=1, at=at, actor="ada", action=action, subject=subject, before=None, after=after, reason=None
    )


def test_a_version_is_live_from_one_move_of_its_alias_to_the_next() -> None:
    lines = [
        line(1, "set_alias", "a@prod", "1"),
        line(2, "start_rollout", "a@prod", "2"),
        line(3, "set_alias", "a@prod", "2"),
        line(4, "set_alias", "b@prod", "1"),
        line(5, "roll_back", "a@prod", "1"),
    ]
    assert lives(lines) == {
        ("a", 1): [(1, 3), (5, math.inf)],
        ("a", 2): [(3, 5)],
        ("b", 1): [(4, math.inf)],
    }


def test_times_count_from_when_a_request_was_due() -> None:
    asked = [Asked("a", 0, due_at=10.0, sent_at=11.0, ended_at=11.5)] * 3
    assert p99_ms(asked) == 1500
    assert math.isnan(p99_ms(asked[:1]))
