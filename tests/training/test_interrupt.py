"""Notices that a machine will be taken away: said once, saved once, and nothing more."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jaxalign.training import interrupt
from jaxalign.training.interrupt import AT_PEACE, Maintenance


def wait_until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():  # asked once only: `come` takes what it gives
            return True
        time.sleep(0.005)
    return False


def test_each_notice_counts_once():
    said, asked, answers = [], [], dict(AT_PEACE)

    def ask():
        asked.append(dict(answers))
        return dict(answers)

    with Maintenance(said.append, ask=ask, every=0.01) as maintenance:
        assert wait_until(lambda: len(asked) > 2)
        assert not maintenance.come() and said == []
        answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert wait_until(maintenance.come)
        seen = len(asked)
        assert wait_until(lambda: len(asked) > seen + 2)
        assert not maintenance.come() and len(said) == 1
        assert "TERMINATE_ON_HOST_MAINTENANCE" in said[0] and "saving now" in said[0]
        answers["preempted"] = "TRUE"
        assert wait_until(maintenance.come) and "preempted TRUE" in said[1] and "HOST" not in said[1]
        answers |= AT_PEACE  # it is over; the next one is news again
        seen = len(asked)
        assert wait_until(lambda: len(asked) > seen + 2) and not maintenance.come()
        answers["preempted"] = "TRUE"
        assert wait_until(maintenance.come)
    assert not maintenance._thread.is_alive()


def test_nobody_is_asked_on_other_machines():
    with Maintenance(print) as maintenance:
        assert not maintenance._thread.is_alive() and not maintenance.come()
    asked = []

    def ask():
        asked.append(1)
        raise ConnectionRefusedError

    with Maintenance(print, ask=ask, every=0.01) as maintenance:
        assert wait_until(lambda: asked and not maintenance._thread.is_alive())
    assert len(asked) == 1


def test_what_google_answers(monkeypatch):
    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith(
                "/computeMetadata/v1/instance/"
            )
            self.send_response(200 if known and answering else 503)
            self.end_headers()
            self.wfile.write({"preempted": b"TRUE\n", "maintenance-event": b"NONE\n"}[self.path.rsplit("/", 1)[1]])

        def log_message(self, *_):
            pass

    answering = True
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(interrupt, "METADATA_SERVER", f"127.0.0.1:{server.server_port}")
        assert interrupt.ask_google() == {"maintenance-event": "NONE", "preempted": "TRUE"}
        answering = False
        with pytest.raises(OSError, match="answers 503"):
            interrupt.ask_google()
        server.shutdown()
