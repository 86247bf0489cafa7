"""A Hub without a network: `HfApi` mocked where the Trainer and the package call it, the repositories in memory."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import run_hub as hub_module
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects, httpx

TOKEN = "hf_WriteSecret"


def http_error(status: int, message: str, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """What the Hub answers, as huggingface_hub raises it."""
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return kind(message, response=response, server_message=message)


class FakeHub:
    """Holds every commit of every repository."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # by repository: (message, files by path)
        self.private: dict[str, bool | None] = {}
        self.faults: dict[str, list[Exception]] = {}  # to raise, by the name of HfApi's method, first one first
        self.api = create_autospec(HfApi, instance=True)
        self.api.create_repo.side_effect = self._create_repo
        self.api.upload_folder.side_effect = self._upload_folder
        self.api.auth_check.side_effect = lambda *_, **__: self._fail("auth_check")
        self.api.repo_info.side_effect = lambda *_, **__: self._fail("repo_info")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it in the place of the Hub, which is online, for a user who has no token but the one given."""
        trainer: Any = transformers.trainer
        if hasattr(trainer, "hf_api"):
            patch.setattr(trainer, "hf_api", lambda: self.api)
        else:  # transformers before 5.10
            for name in ("create_repo", "upload_folder"):
                patch.setattr(trainer, name, getattr(self.api, name))
        patch.setattr(hub_module, "HfApi", lambda token: self.api)
        patch.setattr(hub_module, "get_token", lambda: None)
        patch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository."""
        return self.commits[repo][-1][1]

    def _fail(self, method: str) -> None:
        error = faults.pop(0) if (faults := self.faults.get(method)) else None
        if error is not None:
            raise error

    def _create_repo(self, repo: str, *, token: str, private: bool | None = None, exist_ok: bool = False) -> Any:
        self._fail("create_repo")
        name = repo if "/" in repo else f"someone/{repo}"
        self.commits.setdefault(name, [("initial commit", {})])
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=name)

    def _upload_folder(self, *, repo_id: str, folder_path: Any, path_in_repo: str = ".", **given: Any) -> Any:
        job: Future[None] = Future()
        try:
            self._fail("upload_folder")
            found = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
            kept = filter_repo_objects(map(str, found), ignore_patterns=given.get("ignore_patterns"))
            new = {(Path(path_in_repo) / path).as_posix(): (Path(folder_path) / path).read_bytes() for path in kept}
            self.commits[repo_id].append((given["commit_message"], {**self.files(repo_id), **new}))
            job.set_result(None)
        except Exception as error:
            job.set_exception(error)
        return job if given.get("run_as_future") else job.result()
