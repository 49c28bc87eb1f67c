"""Runs unit tests of a piece of code, inside the sandbox, and reports which passed. `rewards.unit_tests` sends the text
of this file there; nothing imports it.

Standard input is one JSON object: `code`, `tests` ([text, name of a function in it or null] each) and `token`. For each
test that passed, the token and the test's number are written to descriptor 3; what is printed is not looked at. A test
passes if running its text, then calling the function if there is one, raises nothing. So code that ends the process
passes no further test. Each test has a copy of the code's names: it can change objects of them, but not what a name
means for the next test.
"""

# pyright: basic
# (it runs without anything of ours, in any Python)

import json
import os
import sys


def run(request):
    scope = {"__name__": "solution", "__builtins__": __builtins__}
    exec(compile(request["code"], "solution.py", "exec"), scope)
    for number, (text, function) in enumerate(request["tests"]):
        try:
            names = dict(scope)
            exec(compile(text, f"test_{number}.py", "exec"), names)
            if function is not None:
                names[function]()
        except BaseException as error:  # SystemExit, too: whatever ends a test early fails it
            print(f"test {number}: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            os.write(3, f"{request['token']} {number}\n".encode())


run(json.load(sys.stdin))
