"""A program for a pseudo-terminal: follows an invented sweep. Arguments: how many trials run, seconds, how it ends."""

from __future__ import annotations

import sys
import time

from view_samples import a_status, a_trial, some_trials

from sweep.views import live


def main() -> None:
    """Ends as told: `well`, by an `error`, or by Ctrl-C."""
    running, seconds, ending = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    begun = time.monotonic()
    states = ["live", "judging", "waiting"]
    looks = 0

    def status() -> dict[str, object]:
        nonlocal looks
        looks += 1
        trials = [*some_trials(40), *(a_trial(100 + n, states[n % 3]) for n in range(running))]
        return a_status(trials)

    try:
        with live.follow(live.pick_mode(False), status, lambda last: []) as view:
            while time.monotonic() - begun < seconds:
                view.notify()
                time.sleep(0.02)
            if ending == "error":
                raise RuntimeError("the sweep failed")
    except (RuntimeError, KeyboardInterrupt) as error:
        print(f"ended by {type(error).__name__}")
    print(f"done after {looks} looks" if looks <= 2 * seconds + 3 else f"too many looks: {looks}")


if __name__ == "__main__":
    main()
