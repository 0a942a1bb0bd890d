"""One-line mutants: what a slip of the hand could do to this program without an error.

A mutant names the text that it replaces, not where it stands: `find` may be laid out otherwise, and
is looked for in the function `inside`, wherever in the tree that lies (of C++: in the file of that
name), and where it is not there, in the whole tree. `tests` are names of test files (or of folders
in their place), with an expression for pytest's -k behind `::` or without; without a name, of all
files that have a test of such a name.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mutant:
    """`new` in the place of `find`; `why` it may survive, where it is known to."""

    group: str
    inside: str
    find: str
    new: str
    tests: tuple[str, ...]
    why: str = ""
    cpp: bool = False

    @property
    def name(self) -> str:
        return f"{self.inside}: {self.find} → {self.new}"


@dataclass
class _Table:
    mutants: list[Mutant] = field(default_factory=list)

    def group(self, name: str, *tests: str, cpp: bool = False):
        def add(inside: str, find: str, new: str, *own: str, why: str = "") -> None:
            self.mutants.append(Mutant(name, inside, find, new, own or tests, why, cpp))

        return add


_table = _Table()

loss = _table.group("losses", "test_losses.py")
loss("soft_value", "- entropy_coef * log_prob", "+ entropy_coef * log_prob")
loss("soft_value", "with torch.no_grad():", "if True:")
loss("consistency_loss", ".square().mean((1, 2))", ".abs().mean((1, 2))")
loss("consistency_loss", "horizon_weights(rho, len(error), error) * error", "error")
loss("iq_loss", "/ (4 * alpha)", "/ (2 * alpha)")
loss("iq_loss", "-residual[..., :experts]", "-residual[..., experts:]")
loss("iq_loss", "push + value_term + chi2", "push + value_term.detach() + chi2")
loss("td_loss", "residual - reward", "residual + reward")
loss("termination_loss", "new_full((), weight)", "new_full((), 10.0)")
loss("termination_loss", "(logit.detach() > 0)", "(logit.detach() > 1)")
loss("termination_loss", "found / claimed.sum()", "found / terminated.sum()")
loss("gradient_penalty", "(1 - mix) * x[:, experts:]", "(1 - mix) * x[:, :experts]")
loss("gradient_penalty", ".sqrt() - 1", ".sqrt() - 0")
loss("gradient_penalty", "clamp_min(1e-12)", "clamp_min(0)")
loss("model_loss", "discount * (1 - batch.terminated) * target_value", "discount * target_value")
loss("model_loss", "layers.encode(weights, obs[1:])", "layers.encode(weights, obs[:-1])")
loss("model_loss", "(1 - discount) * value.mean()", "(1 - discount) * value.mean().detach()")
loss("model_loss", "(value - backup[:, n:])", "(value - backup[:, :n])")
loss("model_loss", "critic + config.c_gp * penalty", "critic + penalty")
loss(
    "model_loss",
    "config.c_cons * consistency + config.c_iq * critic",
    "config.c_cons * consistency + 0.1 * critic",
)
loss("model_loss", "loss + config.c_termination * ends", "loss + ends")
loss("model_loss", "residual[..., n:].mean()", "residual[..., :n].mean()")
loss("model_loss", "q[..., :n].mean() - q[..., n:].mean()", "q[..., n:].mean() - q[..., :n].mean()")
loss("policy_loss", "entropy_coef * log_prob - q", "entropy_coef * log_prob.detach() - q")
loss(
    "policy_loss",
    "frozen(weights.critics)",
    "weights.critics",
    "test_losses.py",
    "test_learner.py",
)
loss("policy_loss", '"entropy": -log_prob', '"entropy": log_prob')

layer = _table.group("layers", "test_losses.py", "test_model.py")
layer("policy_sample", "torch.tanh(u)", "u.clamp(-1, 1)")
layer("policy_sample", "- log_std - 0.5", "+ log_std - 0.5")
layer("policy_sample", ".log() / action.shape[-1]", ".log()")
layer("policy", "low + 0.5 * (high - low)", "low + 0.4 * (high - low)")
layer("simnorm", "dim=-1).flatten", "dim=-2).flatten")
layer("q_min", ".amin(0)", ".amax(0)")
layer(
    "random_pair",
    "order.topk(2).indices",
    "torch.arange(2, device=order.device)",
    "test_model.py",
)
layer("mish", "(n / (n + 2))", "(n / (n + 1))")

learner = _table.group("learner", "test_learner.py::not compil and not images")
learner("Learner.__init__", "s.lr * s.encoder_lr_scale", "s.lr")
learner("EagerBackend.update_on_device", "x.config.discount", "0.99")
learner(
    "EagerBackend.update_on_device", "s.rho, x.entropy_coef, s.entropy", "s.rho, 0.0, s.entropy"
)
learner("EagerBackend.update_on_device", "s.tau * finite", "0.01 * finite")
learner("EagerBackend.update_on_device", "s.tau * finite", "s.tau * both")
learner("EagerBackend.update_on_device", "x.config.agent.average_rate * finite", "0.005 * finite")
learner("EagerBackend.update_on_device", "x.skipped += ~both", "x.skipped += ~finite")
learner(
    "EagerBackend._step", "clip_grad_norm_(parameters, clip)", "clip_grad_norm_(parameters, 20.0)"
)
learner(
    "EagerBackend._step", "loss.detach().isfinite() & norm.isfinite()", "loss.detach().isfinite()"
)
learner("EagerBackend._keep", "div_(1 - m.dropout)", "div_(1)")
learner("EagerBackend.model_noise", "2, batch.experts if objective", "2, rows if objective")
learner(
    "Learner.load_state_dict",
    't.copy_(state[f"target.{i}.{name}"])',
    't.copy_(t if i else state[f"target.{i}.{name}"])',
)
learner("Learner.load_state_dict", 'self.generator.set_state(state["generator"])', "pass")
learner("Learner.load_state_dict", "held[field].copy_(v)", "pass")
learner(
    "Learner.evaluation_weights",
    "self.weights if self.averages is None else self.averages",
    "self.weights",
)
learner("Learner.acting_weights", 'self.config.agent.average == "always"', "True")
learner(
    "FusedBackend._apply",
    "policy_steps += not policy_skipped",
    "policy_steps += not model_skipped",
)
learner(
    "UpdateSettings.of",
    '"discount": config.discount',
    '"discount": 0.99',
    "test_learner.py",
    "test_iq_update.py",
)
learner("UpdateSettings.of", '"dropout_always": s.dropout == "always"', '"dropout_always": False')
learner("UpdateSettings.of", '"average_rate": config.agent.average_rate', '"average_rate": 0.005')

replay = _table.group("replay", "test_replay.py")
replay("SliceReplay.add", "self._next = first + steps + 1", "self._next = first + steps")
replay(
    "SliceReplay.add", "first + steps - 1] = float(episode.terminated)", "first + steps - 1] = 0.0"
)
replay("SliceReplay.add", "if steps < self.horizon:", "if steps <= self.horizon:")
replay(
    "SliceReplay._make_room",
    "at + steps < first or at >= end",
    "at + steps < first or at >= end - 1",
)
replay(
    "SliceReplay._make_room",
    "self.overwritten += len(self._episodes) < before",
    "pass",
    "test_replay.py",
    "::that_was_overwritten",
)
replay("SliceReplay._index", "steps - self.horizon + 1", "steps - self.horizon + 2")
replay(
    "SliceReplay._draw",
    "torch.randint(self.slices, (batch,)",
    "torch.randint(max(1, self.slices - 1), (batch,)",
)
replay("SliceReplay.state_dict", "first + steps + 1 for first", "first + steps for first")
replay("SliceReplay.load_state_dict", 'self._next = int(state["next"])', "self._next = 0")
replay("join", "experts=expert.action.shape[1]", "experts=behaviour.action.shape[1] - 1")

plan = _table.group("plan", "test_mppi_plan.py", "test_planner.py")
plan(
    "ReferencePlan.begin",
    "previous[:, 1:], torch.zeros_like(previous[:, :1])",
    "previous[:, :1], previous[:, 1:]",
)
plan("ReferencePlan.begin", "self.config.std_max", "1.0")
plan("ReferencePlan.improve", "c.temperature", "0.5")
plan("ReferencePlan.choose", "weight.log() + gumbel", "weight.log() - gumbel")
plan("ReferencePlan.choose", "+ std[:, 0] * explore", "+ std[:, -1] * explore")
plan("ReferencePlan.draw", "-torch.log(-torch.log(uniform", "torch.log(-torch.log(uniform")
plan("ReferencePlan.reset", "slice(None) if problem is None else problem", "slice(None)")
plan("Planner.load_state_dict", 'self.mean.copy_(state["mean"])', "pass")
plan("Planner.plan", "self.nonfinite_plans += plan.nonfinite", "self.nonfinite_plans += 1")
plan("Planner.plan", "self.missed_plans += plan.missed", "pass")
plan("_marked", ".clamp(-1, 1)", ".clamp(-2, 2)")

refit = _table.group("refit", "test_mppi_refit.py")
refit("mppi_refit_reference", "(best > lowest)", "(best >= lowest)")
refit("mppi_refit_reference", "best - best[:, :1]", "best - best[:, -1:]")
refit("mppi_refit_reference", ".nan_to_num(0)", "")
refit("mppi_refit_reference", "clamp(std_min, std_max)", "clamp_min(std_min)")

saved = _table.group("checkpoint", "test_checkpoint.py", "test_files.py")
saved("save", "and not tensor.isfinite().all()", "and tensor.isnan().all()")
saved("RunFolder.save", "[keep - 1 :]", "[keep:]")
saved("load", 'digest(tensors, text) != header.get("digest")', "False")
saved("load", 'header.get("version") != str(VERSION)', "False")
saved(
    "digest", "{name}:{tensor.dtype}:{list(tensor.shape)};", "{tensor.dtype}:{list(tensor.shape)};"
)
saved("digest", "{name}:{tensor.dtype}:{list(tensor.shape)};", "{name}:{list(tensor.shape)};")
saved("digest", "{name}:{tensor.dtype}:{list(tensor.shape)};", "{name}:{tensor.dtype};")
saved("RunFolder._steps", "sorted(found, key=_step, reverse=True)", "sorted(found, reverse=True)")
saved("write_atomically", "os.fsync(file.fileno())", "pass")
saved("write_atomically", "file.flush()", "pass")
saved("write_atomically", "_synchronise(path.parent)", "pass")
saved("write_atomically", "os.replace(temporary, path)", "path.write_bytes(data)")
saved(
    "RunFolder.tidy",
    "for place in (self.path, self.checkpoints):",
    "for place in (self.checkpoints,):",
    "::what_a_kill_has_left",
)
saved("RunFolder.locked", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB")
saved(
    "differences",
    "old[key] != new[key]",
    "old[key] is None",
    "::settings_that_differ",
)

env = _table.group("environments", "test_vector.py", "test_interface.py")
env("step", "env.step(np.array(action))", "env.step(action)")
env("observation", "np.abs(found) <= LARGEST", "np.abs(found) <= np.inf")
env("observation", "int(np.argmin(sound))", "int(np.argmax(sound))")
env("_reward", "not math.isfinite(reward) or", "")
env(
    "success",
    'for name in ("success", key):',
    'for name in (key, "success"):',
    "test_gym.py",
    "test_interface.py",
    "test_evaluation.py",
)
env("VectorEnv.step", "episode.finish(terminated=terminated)", "episode.finish(terminated=over)")
env(
    "VectorEnv.step",
    "len(episode.actions) == self._episode_length",
    "len(episode.actions) > self._episode_length",
)
env(
    "VectorEnv._seed_of",
    'stream_seed(self.seed, "train", number)',
    'stream_seed(0, "train", number)',
)
env(
    "ControlEnv.step",
    "terminated = terminated and self._terminates",
    "pass",
    "test_gym.py",
    "test_cli.py::terminat",
)
env("ControlEnv.step", "total += reward", "total = reward", "test_gym.py")
env(
    "ControlEnv.step",
    "self._steps >= self.config.episode_length",
    "self._steps > self.config.episode_length",
    "test_gym.py",
)
env("scaled", "(action + 1) * 0.5", "(action + 1) * 0.4", "test_gym.py")
env(
    "TransitionNoise.step",
    "self._random.random() < self.p",
    "self._random.random() < 0.5",
    "test_gym.py",
)
env("_members", "sorted(space.spaces)", "space.spaces", "test_gym.py")
env(
    "WorkerVectorEnv._replace",
    "self.restarts >= self.max_restarts",
    "self.restarts > self.max_restarts",
    "test_workers.py::restarts",
)

evaluation = _table.group("evaluation", "test_evaluation.py")
evaluation(
    "evaluate",
    'stream_seed(seed, "eval", index)',
    'stream_seed(seed, "eval", 0)',
    "test_evaluation.py",
    "::evaluation_is_repeatable",
)
evaluation("_Watched.step", "bool(self.solved) or success", "success")
evaluation("_Watched.reset", "self.solved = None", "pass")
evaluation("rollout", "len(episode.actions) == episode_length", "len(episode.actions) == 1000")
evaluation("Evaluation.success_rate", "e.success for e in self.episodes", "s for s in self.solved")
evaluation("reward_correlation", "== len(e.actions) - 1", ">= 0")
evaluation(
    "Agent.decode_reward", "self.entropy_coef * log_prob", "0.0 * log_prob", "::decoded_reward"
)
evaluation(
    "Agent.decode_reward",
    "self.config.discount * alive * value",
    "self.config.discount * value",
    "::decoded_reward",
)
evaluation(
    "ratio",
    "demonstrator <= 0",
    "demonstrator == 0",
    "::negative_return",
    "test_table.py",
    "test_evaluation.py",
)
evaluation("mixed_episodes", "noises[index % len(noises)]", "noises[0]")

trainer = _table.group("trainer", "test_trainer.py")
trainer("Trainer._act", "2 * uniform - 1", "uniform", "::random_actions")
trainer(
    "SliceReplay.add",
    "float(episode.terminated)",
    "float(False)",
    "::terminations_reach",
)
trainer("Trainer._act", "self.updates.ready(self.env_steps)", "True", "::random_actions")
trainer("Trainer._evaluate", "seed=self.config.seed", "seed=0", "::evaluated_in_episodes")
trainer(
    "Trainer._go_on",
    'self._wall_before, self._evaluated_at = meta["wall_s"], meta["evaluated_at"]',
    'self._evaluated_at = meta["evaluated_at"]',
    "::resume_is_exact",
)
trainer(
    "Updates.due",
    "math.floor(since * c.train.update_rate)",
    "math.ceil(since * c.train.update_rate)",
    "::a_fraction_of",
)
trainer(
    "Trainer._train",
    "if ended and self.updates.complete(self.env_steps):",
    "if False:",
    "::test_a_signal_ends",
)
trainer(
    "Trainer._rescue",
    "whole.overwritten != self.behaviour.overwritten",
    "False",
    "::that_was_overwritten",
)
trainer(
    "Agent.__init__",
    "discount=config.discount",
    "discount=0.5",
    "::agent_plans_with_the_discount",
    "test_planner.py",
)
trainer(
    "Config.entropy_coefficient",
    'action_dim if self.learner.entropy_scale == "action_dim" else 1',
    "1",
    "test_config.py",
)
trainer(
    "Config.discount", "(fraction - 1) / fraction", "(fraction - 2) / fraction", "test_config.py"
)

log = _table.group("log", "test_runlog.py")
log("strict_json", "not math.isfinite(value)", "False")
log("read_rows", "if index == 0 and set(PROGRESS)", "if set(PROGRESS)")
log("_kept", "evaluated if row", "since if row")
log("last_evaluations", "[-_LAST:]", "[: _LAST]")

reader = _table.group("readers")
for _inside, _find, _new, _tests in (
    ("Budget.spend", "if self._left < 0:", "if False:", ("test_isolated.py::small_files",)),
    (
        "stored",
        "found.is_virtual or found.external",
        "False",
        ("test_hdf5.py", "test_native.py", "test_formats.py"),
    ),
    (
        "stored",
        "isinstance(link, h5py.HardLink) else link",
        "True else link",
        ("test_hdf5.py", "test_native.py", "test_formats.py"),
    ),
    (
        "values",
        "claimed > _FREE_BYTES + MAX_RATIO * kept",
        "False",
        ("test_hdf5.py", "test_native.py", "test_formats.py"),
    ),
    (
        "Assembly.add",
        "actions = actions[:-1]",
        "actions = actions[1:]",
        (
            "test_maniskill.py",
            "test_minari.py",
            "test_robomimic.py",
            "test_formats.py",
            "test_lerobot.py",
            "test_d4rl.py",
        ),
    ),
    (
        "Assembly.add",
        "observations, next_observations[-1:]",
        "observations, observations[-1:]",
        ("test_d4rl.py", "test_robomimic.py"),
    ),
    ("_ends", "terminals | timeouts", "timeouts", ("test_d4rl.py",)),
    (
        "_rescale",
        "2 * ((actions - low) / (high - low)) - 1",
        "(actions - low) / (high - low)",
        ("test_formats.py", "test_minari.py"),
    ),
    ("_clip", "np.abs(actions) > 1", "actions > 1", ("test_formats.py", "test_isolated.py::clips")),
    (
        "numbered",
        "key=lambda name: int(name.removeprefix(prefix))",
        "key=str",
        ("test_maniskill.py", "test_minari.py", "test_robomimic.py", "test_formats.py"),
    ),
    ("_episode_defects", "(actions < -1) | (actions > 1)", "(actions < -1)", ("test_checks.py",)),
    ("_array_defects", "np.abs(array) > LARGEST", "np.abs(array) > np.inf", ("test_checks.py",)),
    ("_find", "0 < present < len(episodes)", "False", ("test_checks.py",)),
    (
        "_Unpickler.find_class",
        "self._allowed[module, name]",
        "super().find_class(module, name)",
        ("test_legacy.py",),
    ),
    ("_from_bytes", "if claimed != len(raw):", "if claimed > len(raw):", ("test_legacy.py",)),
    (
        "_episodes",
        "isinstance(value, np.ndarray) and len(value) != ends[-1]",
        "False",
        ("test_npz.py",),
    ),
    (
        "Sb3Policy.__call__",
        "2 * (x.clamp(low, high) - low)",
        "(x.clamp(low, high) - low)",
        ("test_sb3.py",),
    ),
    ("_unpacked", "if claimed > limit:", "if False:", ("test_sb3.py", "test_isolated.py")),
):
    reader(_inside, _find, _new, *_tests)

native = _table.group("C++", "test_iq_update.py", cpp=True)
native(
    "learner_blocks.cpp", "- set.entropy_coef * w.log_prob.data()[r]; sums.target", "; sums.target"
)
native("learner_blocks.cpp", "(1 - source.terminated(t, column(i))) * v", "v")
native(
    "learner_blocks.cpp",
    "slope = residual / (2 * set.alpha * all)",
    "slope = residual / (set.alpha * all)",
)
native(
    "learner_blocks.cpp",
    "out[j] = u * expert[j] + (1 - u) * partner[j]",
    "out[j] = u * partner[j] + (1 - u) * expert[j]",
)
native(
    "learner_blocks.cpp",
    "float shares[2] = {q.first, 1 - q.first}",
    "float shares[2] = {1.0f, 0.0f}",
)
native("learner_blocks.cpp", "set.entropy_coef * log_prob - q.value", "log_prob - q.value")
native("learner.cpp", "slow.step.rate *= settings.encoder_lr_scale", "slow.step.rate *= 1.0f")
native("learner.cpp", "s.grad_clip / (norm + 1e-6)", "20.0 / (norm + 1e-6)")
native(
    "learner.cpp",
    "!std::isfinite(loss) || !std::isfinite(model_norm)",
    "!std::isfinite(loss)",
    "test_iq_update.py",
    "test_learner.py::fused",
)
native("learner.cpp", "key.below(stream, i, replay.slices)", "key.below(stream, 0, replay.slices)")
native(
    "learner.cpp",
    "layer.follow(strip, *follows, settings.tau)",
    "layer.follow(strip, *follows, 0.01f)",
)
native(
    "planner.cpp",
    "previous + (t + 1) * a",
    "previous + t * a",
    "test_mppi_plan.py",
    "test_planner.py",
)
native("planner.cpp", "settings.temperature * (g - best)", "0.5f * (g - best)", "test_mppi_plan.py")
native("planner.cpp", "if (value > highest)", "if (value < highest || i == 0)", "test_mppi_plan.py")
native(
    "planner.cpp",
    "p.finite ? p.mean.data()[t * pad + j] : 0.0f",
    "p.mean.data()[t * pad + j]",
    "test_mppi_plan.py",
    "test_planner.py",
)
native(
    "rollout.cpp",
    "weight *= block.discount",
    "weight *= 1.0f",
    "test_mppi_rollout.py",
    "test_mppi_plan.py",
)

MUTANTS = tuple(_table.mutants)
