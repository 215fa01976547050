"""What asks a run to save, or to end: signals end it between two steps, a maintenance notice has it save at once."""

import http.client
import signal
import threading
from collections.abc import Callable

import jax

from jaxalign.data.patience import hurry

METADATA_SERVER = "metadata.google.internal"  # of Google's cloud, asked by its virtual machines
# What stands there in peace. (`upcoming-maintenance` is a plan for the next days and no reason to do anything.)
AT_PEACE = {"maintenance-event": "NONE", "preempted": "FALSE"}


class Interrupts:
    """Context in which the first SIGTERM or SIGINT is remembered and a second one acts at once.

    True in a condition once a signal came; `status` is the shell's exit status for it. Outside of the main thread
    (a notebook's worker, a test) nothing is caught.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.signal, self._before = say, None, {}

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name, as people know it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name

    @property
    def status(self) -> int:
        """128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal

    def __enter__(self) -> "Interrupts":
        try:
            self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # only the main thread may
            self._before = {}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        # A machine that is taken away leaves less time than a batch waits for a disk. Of several processes none can
        # save without its batch: there the disk may be back in time.
        if jax.process_count() == 1:
            hurry()
        self.say(f"{self.name}: finishing this step and saving; once more to stop at once")


class Maintenance:
    """A context in which the cloud is asked whether it is about to take this machine away (TPUs of Google's).

    `come()` is True once for each notice. It comes a minute to an hour before the machine goes, so it is a reason to
    save and none to stop: SIGTERM follows, where something sends it. JAX's own preemption service knows of no other
    notice than SIGTERM. `ask` gives what stands under AT_PEACE's names, and OSError where nobody answers.
    """

    def __init__(self, say: Callable[[str], None], *, ask: Callable[[], dict[str, str]] | None = None, every=5.0):
        self.say, self.ask, self.every = say, ask, every
        if ask is None and jax.default_backend() == "tpu":
            self.ask = ask_google
        self._come, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="maintenance")

    def __enter__(self) -> "Maintenance":
        if self.ask is not None:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=1.0)  # it may wait for an answer; nobody waits for it

    def come(self) -> bool:
        """Whether a notice came since this was asked last."""
        came = self._come.is_set()
        self._come.clear()
        return came

    def _watch(self) -> None:
        before = AT_PEACE
        while not self._end.wait(self.every):
            try:
                now = self.ask()
            except (OSError, http.client.HTTPException):
                if before is AT_PEACE:  # a machine of somebody else's
                    return
                continue
            news = {name: value for name, value in now.items() if value not in (AT_PEACE.get(name), before.get(name))}
            if news:
                self._come.set()
                said = ", ".join(f"{name} {value}" for name, value in news.items())
                self.say(f"the cloud announces {said} for this machine: saving now and going on")
            before = now


def ask_google() -> dict[str, str]:
    """What Google's cloud says of this machine, by the names in AT_PEACE; OSError elsewhere."""
    answers = {}
    for name in AT_PEACE:
        connection = http.client.HTTPConnection(METADATA_SERVER, timeout=5.0)
        try:
            connection.request("GET", f"/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"})
            response = connection.getresponse()
            text = response.read(100).decode(errors="replace").strip()
            if response.status != 200:
                raise OSError(f"{METADATA_SERVER} answers {response.status}")
            answers[name] = text
        finally:
            connection.close()
    return answers
