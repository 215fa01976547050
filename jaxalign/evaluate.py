"""Metrics of finished runs: `python -m jaxalign.evaluate {loss,probe,motion} --workdir RUN [--workdir RUN ...]`, and of
teachers before a run: `python -m jaxalign.evaluate teachers --teachers NAME[:setting=value...],... --videos WHERE`.

loss    held-out denoising loss by time, alignment distance (the run's own head), motion of samples beside real clips
probe   how much of the teacher each student holds: the alignment distance on raw tapped tokens, through a fresh head
        trained for each frozen student (same seed, data and steps), and through the run's own head where that was
        trained for it. The first --workdir with an alignment says which teacher, block and method.
teachers  what frozen teachers see in videos (a file, a folder or `demo`), to choose one before spending GPU-days on
        it: IICR over k, spectrum and its gap Δ (Align4Gen), PCA maps, trajectories, X-T slices, flow
motion  of a run of configs/moalign_subspace.py: R² of ridge probes of flow and colour, from its subspace and from as
        many principal components of the raw tokens, on held-out clips; a CSV, and figures of predicted and true flow
fvd, fid, inception_score, clip: generated videos, as Align4Gen scores them (--network NAME --weights FILE). Of a run
        --count are generated, which goes on where it was stopped; or --videos FOLDER [--real SOURCE] scores a folder
scaling --root FOLDER: how the held-out loss of a sweep's runs (launch/sweep.py) falls with compute, size and data:
        power laws with intervals, scaling.png and scaling.json there
compare --root FOLDER: the methods of a sweep (configs/compare.py) beside each other, mean ± deviation over seeds:
        held-out losses, and of --count samples a run (128) the distance from real clips and from the law of
        synthetic:gravity; compare.md, .csv, .json and .png there

Held-out clips, times and noise are the same for every run. Rows are printed as a Markdown table and kept as JSON:
evaluate_loss.json in each workdir, evaluate_probe.json in the first, a score beside those of other videos or weights.
--workdir RUN takes the newest checkpoint; RUN/checkpoints/STEP takes that one, and evaluate_loss_stepSTEP.json is kept.
`teachers` keeps a CSV and pictures in --out.
"""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from jaxalign.data import pipeline
from jaxalign.figures import scaling as scaling_figure
from jaxalign.figures import teachers as teacher_figures
from jaxalign.metrics import scaling as scaling_laws
from jaxalign.metrics import teacher_report
from jaxalign.metrics.motion import motion_magnitude
from jaxalign.training import comparison, evaluation, motion_report, outcomes, prompts, scoring, showing, subspaces
from jaxalign.training import config as config_lib
from jaxalign.training import probe as probe_lib
from jaxalign.training.data_settings import clip_settings, counted, split_batch
from jaxalign.training.restore import find_checkpoint
from jaxalign.training.trained import open_run, read_config, whole, workdir_of

SHOWN_CLIPS = 3  # clips that the pictures of `teachers` show


def loss(workdirs: Sequence[Path], *, weights: str = "ema", clips: int = 16, times: int = 8) -> list[dict]:
    """One row a run; see the module's docstring. Raises FileNotFoundError for a folder that is no run."""
    rows = []
    for given in workdirs:
        workdir, checkpoint = workdir_of(given), find_checkpoint(given)
        config, run, trainable = open_run(workdir, weights=weights, checkpoint=checkpoint)
        batches = held_out(config, clips)
        losses = evaluation.held_out_losses(run, trainable, batches, times=times)
        tokens = prompts.for_samples(config, batches)
        samples = showing.Sampler(run, config, tokens=tokens)(trainable["model"], run.frozen)
        real = np.concatenate([motion_magnitude(batch["video"][: counted(batch)]) for batch in batches])
        row = {
            "run": workdir.name,
            "step": int(checkpoint.name),
            "weights": weights,
            **evaluation.summarise(losses),
            "denoising_by_time": [round(float(v), 6) for v in losses["denoising"]],
            "motion_of_samples": float(motion_magnitude(samples).mean()),
            "motion_of_real_clips": float(real.mean()),
        }
        _keep(workdir / f"evaluate_loss{_named(given, checkpoint)}.json", row)
        rows.append(row)
    return rows


def probe(
    workdirs: Sequence[Path],
    *,
    weights: str = "ema",
    clips: int = 16,
    times: int = 8,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[dict]:
    """Two or three rows a run; see the module's docstring.

    Raises ValueError when none of the runs aligns anything, or when they differ in clips, process or codec.
    """
    configs = {str(w): read_config(w) for w in workdirs}
    aligned = next((w for w, config in configs.items() if config.align.method != "none"), None)
    if aligned is None:
        raise ValueError(
            "probe: none of the runs aligns anything; give one that does, it says which teacher to ask for"
        )
    for w, config in configs.items():
        probe_lib.check_alike(w, config, aligned, configs[aligned])
    places = {w: find_checkpoint(w) for w in configs}  # a run that still trains has another one soon
    base = whole(open_run(aligned, weights=weights, checkpoint=places[aligned]))
    alignment = probe_lib.probed(base.run)
    sections = {name: base.config[name].to_dict() for name in ("align", "teacher")}
    asked = dict(weights=weights, overrides=sections)
    students = {}
    for w in configs:
        opened = whole(open_run(w, checkpoint=places[w], **asked))
        probe_lib.check_fits(w, opened.run, aligned, base.run)
        students[w] = opened.trainable["model"]
    batches = pipeline.batches(
        prompts.open_told(base.config),
        seed=seed + 1,
        batch_size=base.config.batch_size,
        hflip=base.config.data.hflip,
        **clip_settings(base.config),
    )

    def progress(step, losses):
        if step % 25 == 0 or step == steps:
            shown = ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
            print(f"fresh heads, step {step}/{steps}: {shown}", flush=True)

    stream = batches.iterate()
    options = dict(steps=steps, learning_rate=learning_rate, seed=seed, progress=progress)
    fresh = probe_lib.fit_heads(base.run, students, stream, **options)
    stream.close()
    held = held_out(base.config, clips)
    rows = []
    for w, model in students.items():
        heads = {"fresh head": fresh[w]}
        if probe_lib.raw_tokens_compare(base.run, alignment):
            heads = {"no head (raw tokens)": {}} | heads
        if probe_lib.asks_alike(configs[w], configs[aligned]):
            heads["own head"] = open_run(w, weights=weights, checkpoint=places[w]).trainable["heads"]
        for kind, head in heads.items():
            measured = probe_lib.measure(base.run, {"model": model, "heads": head}, held, times=times)
            row = {"run": w, "step": int(places[w].name), "weights": weights, "read through": kind}
            rows.append(row | {"denoising": measured["denoising"], alignment.method: measured["aligned"]})
    named = _named(workdirs[0], places[str(workdirs[0])])
    _keep(workdir_of(workdirs[0]) / f"evaluate_probe{named}.json", rows)
    return rows


def teachers(
    asked: Sequence[teacher_report.Asked],
    videos: str,
    out: Path,
    *,
    clips: int = 16,
    frames: int = 16,
    size: tuple[int, int] = (256, 256),
    stride: int = 3,
    clusters: Sequence[int] = (2, 4, 8, 16, 32),
) -> list[dict]:
    """One row a teacher, written to teachers.csv in `out` beside the pictures; see the module's docstring.

    Raises ValueError and FileNotFoundError for teachers, weights and videos that are not there or do not fit.
    """
    shapes = teacher_report.check(asked, (frames, *size))
    given = teacher_report.open_clips(videos, clips, frames=frames, size=size, stride=stride)
    print(f"{len(given.videos)} clips of {frames} frames at {size[0]}×{size[1]} from {len(set(given.names))} videos")
    for note in given.notes:
        print(f"  {note}")
    shown, measured = teacher_report.clips_to_show(given.names, SHOWN_CLIPS), []
    for one, shape in zip(asked, shapes, strict=True):
        print(f"{one.label}: {'×'.join(map(str, shape[:3]))} outputs of {shape[3]}", flush=True)
        measured.append(teacher_report.measure(one, given.videos, clusters, show=shown, progress=_say_clips(clips)))
    rows = [teacher_report.row(one, clusters) for one in measured]
    paths = teacher_figures.draw(measured, given, shown, clusters, out)
    _write_csv(out / "teachers.csv", rows)
    if len({one.shape[1:3] for one in measured if not one.is_flow}) > 1:
        print("note: Δ depends on the grid; compare it between teachers whose rows and columns are equal")
    print("to look at:", *(f"  {path}" for path in [out / "teachers.csv", *paths]), sep="\n")
    return rows


def motion(workdirs: Sequence[Path], *, weights: str = "ema", clips: int = 32) -> list[dict]:
    """Three rows a run, kept in evaluate_motion.csv there beside figures/motion_*.png; see the module's docstring.

    Raises ValueError for a run of another task, FileNotFoundError for a folder that is no run.
    """
    rows = []
    for given in workdirs:
        workdir, checkpoint = workdir_of(given), find_checkpoint(given)
        opened = open_run(workdir, weights=weights, checkpoint=checkpoint, task=subspaces.TASK)
        about, named = {"run": workdir.name, "step": int(checkpoint.name)}, _named(given, checkpoint)
        own = [about | row for row in motion_report.measure(opened, clips=clips)]
        paths = [workdir / f"evaluate_motion{named}.csv"]
        _write_csv(paths[0], own)
        for k, batch in enumerate(held_out(opened.config, SHOWN_CLIPS, at_once=1)):
            paths.append(workdir / "figures" / f"motion{named}_{k}.png")
            showing.PredictedFlow(opened.run, batch)(opened.trainable, None, paths[-1])
        print("to look at:", *(f"  {path}" for path in paths), sep="\n")
        rows += own
    return rows


def _named(given: Path, checkpoint: Path) -> str:
    """What names of results end with: the step of a checkpoint that was given itself, nothing for a run's newest."""
    return f"_step{checkpoint.name}" if checkpoint == given.absolute() else ""


def _write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _say_clips(count: int):
    """A line about every fourth of the clips: k-means takes its time."""
    every = max(1, count // 4)
    return lambda done: print(f"  clip {done}/{count}", flush=True) if done % every == 0 else None


def scaling(root: Path, *, replicates: int = scaling_laws.REPLICATES) -> tuple[list[dict], list[dict]]:
    """(a row a group of seeds, a row a number of each law); see the module's docstring.

    Raises FileNotFoundError for a folder without finished runs.
    """
    runs, remarks = outcomes.read(root)
    points, more = outcomes.scaling_points(runs)
    front, laws, missing = scaling_laws.analyse(points, replicates=replicates)
    remarks += more + missing
    rows = []
    for group in dict.fromkeys(p.group for p in sorted(points, key=lambda p: (p.clip_tokens, p.parameters))):
        own = [p for p in points if p.group == group]
        ends = [p for p in own if p.tokens == max(q.tokens for q in own)]
        losses = [p.loss for p in ends]
        rows.append(
            {
                "runs": group,
                "seeds": len(ends),
                "parameters": ends[0].parameters,
                "tokens a clip": ends[0].clip_tokens,
                "tokens seen": f"{ends[0].tokens:.3g}",
                "FLOPs": f"{ends[0].compute:.3g}",
                "denoising": float(np.mean(losses)),
                "std": float(np.std(losses, ddof=1)) if len(losses) > 1 else "",
                "points on the envelope": sum(p.group == group for p in front),
            }
        )
    numbers = [
        {"law": one.title, "number": name, "value": value, "95 % from": low, "to": high, "points": len(one.points)}
        for one in laws
        for name, (value, low, high) in one.numbers().items()
    ]
    scaling_figure.draw(points, front, laws, root / "scaling.png", note="" if laws else "\n".join(remarks))
    for remark in remarks:
        print(f"note: {remark}")
    kept = {"points": [dataclasses.asdict(p) for p in points], "envelope": [dataclasses.asdict(p) for p in front]}
    kept["laws"] = [
        {"title": one.title, **dataclasses.asdict(one.law), "replicates": len(one.replicates)} for one in laws
    ]
    _keep(root / "scaling.json", kept | {"numbers": numbers, "remarks": remarks})
    print(f"to look at: {root / 'scaling.png'}")
    return rows, numbers


def compare(root: Path, *, samples: int = 128, clips: int = 32, weights: str = "ema") -> str:
    """The table of a sweep's runs as Markdown, kept in compare.md, .csv, .json and .png; see the module's docstring.

    Raises FileNotFoundError for a folder without finished runs.
    """
    runs, remarks = outcomes.read(root)
    questions = comparison.Questions(samples, clips, weights)
    rows, more = comparison.answers([run for run in runs if not subspaces.is_subspace(run.config)], questions)
    paths = comparison.write(root, rows, remarks + more, questions)
    _write_csv(root / "compare.csv", comparison.by_run(rows))
    comparison.draw(rows, root / "compare.png")
    print("to look at:", *(f"  {path}" for path in [*paths, root / "compare.csv", root / "compare.png"]), sep="\n")
    return comparison.markdown(rows, remarks + more)


def held_out(config, clips: int, *, at_once: int | None = None) -> list[dict]:
    """`clips` held-out clips of a run's source, in batches of equal size (default: the run's)."""
    found = pipeline.held_out(prompts.open_told(config), clips, **clip_settings(config))
    return split_batch(found, at_once or min(config.batch_size, clips))


def _keep(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"kept in {path}")


def table(rows: list[dict]) -> str:
    """Rows as Markdown; lists stay in the JSON."""
    names = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list)))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        lines.append("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    given = flags.FLAGS
    words = {"loss": loss, "probe": probe, "motion": motion}
    known = (*words, *scoring.NETWORKS, "teachers", "scaling", "compare")
    if len(argv) != 2 or argv[1] not in known:
        names = ",".join(known)
        raise ValueError(f"write what to evaluate: python -m jaxalign.evaluate {{{names}}} --workdir RUN")
    if argv[1] == "teachers":
        return _teachers_of_flags(given)
    if argv[1] in scoring.NETWORKS:
        print(table(_scores_of_flags(argv[1], given)))
        return 0
    if argv[1] in ("scaling", "compare"):
        if not given.root:
            raise ValueError("--root is missing: give the --root of launch/sweep.py")
        if argv[1] == "compare":
            named = {"samples": "count", "clips": "clips"}  # whose defaults are others here
            options = {k: given[v].value for k, v in named.items() if given[v].present}
            print(compare(Path(given.root), weights=_ema_or_raw(given.weights), **options))
            return 0
        print(*(table(rows) for rows in scaling(Path(given.root)) if rows), sep="\n\n")
        return 0
    if not given.workdir:
        raise ValueError("--workdir is missing: give the folder of a run")
    options = dict(weights=_ema_or_raw(given.weights), clips=given.clips)
    if argv[1] != "motion":
        options["times"] = given.times
    if argv[1] == "probe":
        options |= dict(steps=given.steps, learning_rate=given.learning_rate, seed=given.seed)
    print(table(words[argv[1]]([Path(w) for w in given.workdir], **options)))
    return 0


def _ema_or_raw(weights: str) -> str:
    if weights not in ("ema", "raw"):
        raise ValueError(f"--weights={weights}: write ema or raw")
    return weights


def _scores_of_flags(word: str, given) -> list[dict]:
    if given.weights == "raw":
        raise ValueError("--weights=raw: here that is the network's file; the student's last weights are --student raw")
    names = ("videos", "real", "network", "count", "seed", "split", "sampler", "guidance_scale", "student", "frames")
    names += ("stride", "videos_stride", "lists", "frame_rate", "at_once")
    options = {name: given[name].value for name in names}
    options |= dict(steps=given.sample_steps, size=teacher_report.parse_size(given.size))
    options |= dict(weights=None if given.weights == "ema" else given.weights)
    options |= dict(cache=given.cache or None, tokenizer=given.tokenizer or None)
    options |= dict(out=given.out if given["out"].present else None)
    rows = [scoring.score(word, workdir=w, **options) for w in (given.workdir or [None])]
    return [row for own in rows for row in own]


def _teachers_of_flags(given) -> int:
    if not given.videos:
        raise ValueError("--videos is missing: give a file, a folder, or demo")
    asked = teacher_report.parse_teachers(given.teachers, "" if given.weights == "ema" else given.weights)
    try:
        clusters = sorted({int(k) for k in given.clusters})
    except ValueError:
        raise ValueError(f"--clusters={','.join(given.clusters)}: write whole numbers, 2,4,8") from None
    options = dict(clips=given.clips, frames=given.frames, stride=given.stride, clusters=clusters)
    size = teacher_report.parse_size(given.size)
    print(table(teachers(asked, given.videos, Path(given.out), size=size, **options)))
    return 0


if __name__ == "__main__":
    flags.DEFINE_multi_string("workdir", [], "A run to look at, or RUN/checkpoints/STEP; may be given several times.")
    flags.DEFINE_string(
        "weights",
        "ema",
        "ema or raw: the averaged students or the last ones. teachers: NAME=FILE,... of their files. Scores: the "
        "network's file.",
    )
    flags.DEFINE_integer("clips", 16, "Clips; of a run's the held-out ones.", lower_bound=1)
    flags.DEFINE_integer("times", 8, "Times of the process at which each clip is asked.", lower_bound=3)
    flags.DEFINE_integer("steps", 200, "probe: training steps of a fresh head.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-3, "probe: of a fresh head (Adam, cosine to zero).")
    flags.DEFINE_integer("seed", 0, "probe: of the fresh heads and their data. Scores: of the videos.")
    flags.DEFINE_string("root", "", "scaling, compare: the folder of a sweep's runs.")
    flags.DEFINE_string("teachers", "", "teachers: NAME[:setting=value...], several with commas between.")
    flags.DEFINE_string("videos", "", "teachers, scores: a file, a folder of videos, or a source (demo).")
    flags.DEFINE_string(
        "out", "runs/teachers", "teachers: the folder for CSV and pictures. Scores of --videos: for rows (runs/scores)."
    )
    both = "teachers, scores of --videos: "
    flags.DEFINE_integer("frames", 16, both + "frames of a clip.", lower_bound=2)
    flags.DEFINE_string("size", "256", both + "pixels of a clip, 256 or HEIGHTxWIDTH; each network resizes them.")
    flags.DEFINE_integer("stride", 3, both + "frames of the video (--real's) from one of the clip to the next.", 1)
    flags.DEFINE_list("clusters", "2,4,8,16,32", "teachers: the numbers of clusters k of IICR.")
    flags.DEFINE_string("network", "", "Scores: i3d, videomaev2_g, inception, c3d, clip_vit_b32, efficientnet_lite0 …")
    flags.DEFINE_string("real", "", "fvd, fid: the source of the real videos; default: the run's own.")
    flags.DEFINE_integer("count", 2048, "Scores: videos, generated and real. compare: samples (128).", lower_bound=2)
    flags.DEFINE_string("split", "held_out", "fvd, fid: held_out or train, of the real videos.")
    flags.DEFINE_integer("sample_steps", 50, "Scores: calls of the student a video.", lower_bound=1)
    flags.DEFINE_string("sampler", "", "Scores: ddim, ddpm, dpm or euler; default: the process's first.")
    flags.DEFINE_float("guidance_scale", 1.0, "Scores: of the generated videos; 1 is without.")
    flags.DEFINE_enum("student", "ema", ["ema", "raw"], "Scores: the averaged student or the last one.")
    flags.DEFINE_integer("at_once", 8, "Scores: videos in a batch.", lower_bound=1)
    flags.DEFINE_string("cache", "", "fvd, fid: folder of the real videos' statistics; default: in the user's cache.")
    flags.DEFINE_string("tokenizer", "", "clip: folder or BPE file for CLIP-T, where videos have captions.")
    flags.DEFINE_integer("videos_stride", 1, "Scores: frames of a video in --videos to the next.", lower_bound=1)
    flags.DEFINE_integer("lists", None, "Scores of --videos: the number of UCF-101's lists in --real (1).", 1)
    flags.DEFINE_float("frame_rate", None, "Scores of --videos: frames a second of folders of frames (25).")
    config_lib.run_verb(main)
