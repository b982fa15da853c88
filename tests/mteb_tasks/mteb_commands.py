"""Run mteb's own command line several times in this process and print what came of it, as JSON.

Started by `test_mteb_command` in an interpreter of its own, with the start-up hook on or off. There is no hub here:
`ModelMeta.from_hub` describes two folders, as it would describe models of the hub that are not in mteb's registry.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path, models: dict[str, str]) -> None:
    import mteb
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    from tests.mteb_tasks.foreign import ForeignRetrieval, ForeignSTS

    for task in (ForeignSTS, ForeignRetrieval):
        sys.modules["mteb.get_tasks"]._TASKS_REGISTRY[task.metadata.name] = task

    def from_hub(name, revision=None, **_):
        if name not in models:
            raise OSError(f"{name} is not a model of the hub")

        def load(name, revision=None, device=None, **_):
            wrapper = SentenceTransformerEncoderWrapper(SentenceTransformer(models[name], device="cpu"))
            return wrapper

        return ModelMeta.create_empty({"name": name, "revision": revision or "abc", "loader": load})

    ModelMeta.from_hub = from_hub
    from mteb.cli import main as mteb_main

    outcomes = {}
    for name, arguments in json.loads(sys.stdin.read()).items():
        sys.argv = ["mteb", *(word.replace("FOLDER", str(folder)) for word in arguments)]
        if arguments[:1] == ["run"] and "--help" not in arguments:
            sys.argv += ["--output-folder", str(folder / name)]
        print(f"<{name}>")
        try:
            mteb_main()
            outcomes[name] = "done"
        except BaseException as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        print(f"</{name}>")
    outcomes["selected"] = sorted(task.metadata.name for task in mteb.get_tasks(modalities=["image"]))
    known = [meta.name for meta in mteb.get_model_metas()] + [benchmark.name for benchmark in mteb.get_benchmarks()]
    outcomes["known"] = sorted(str(name) for name in known)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
