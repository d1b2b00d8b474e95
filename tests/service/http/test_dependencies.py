import inspect

from service.http import dependencies


def test_what_handlers_are_given_is_fetched_without_a_thread() -> None:
    functions = [
        f for _, f in inspect.getmembers(dependencies, inspect.isfunction) if f.__module__ == dependencies.__name__
    ]
    assert len(functions) >= 5
    assert all(map(inspect.iscoroutinefunction, functions))
