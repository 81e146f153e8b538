"""Change one thing in the code, and see the test fail that is there to notice: python .ci/mutations.py

    python .ci/mutations.py                 all of them, two at a time
    python .ci/mutations.py window cache    those whose story has one of these words

Every mutation is tried on a copy of the repository, in a process of its own. A mutation that no test
notices, whose fragment is not found exactly once, or that ends in anything but a failed assertion,
makes this script exit with status 1. First, all named tests must pass without any mutation.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(".git", "out", "__pycache__", "*.egg-info", ".*_cache", "build")

RMT = [  # the story, a fragment of rmt.py, what it becomes, the test that notices
    ("truncation is a no-op",
     "            state = state.detach()\n        if checkpoint",
     "            state.detach()\n        if checkpoint",
     "test_truncated_bptt_cuts_here"),
    ("the initial memory is cut off",
     "if bptt_depth is None or s == 0:",
     "if bptt_depth is None:",
     "test_the_initial_memory_learns_at_every_depth"),
    ("depth counts segments, not boundaries",
     "% (bptt_depth + 1)",
     "% max(1, bptt_depth)",
     "test_the_last_loss_reaches_exactly_bptt_depth_segments_back"),
    ("cuts are counted from the start",
     "return (n_segments - s) %",
     "return s %",
     "test_truncated_gradient_is_its_share_of_the_full_one"),
    ("the replay loses the gradient to the state",
     "recompute(model, segment, state, use",
     "recompute(model, segment, state.detach(), use",
     "test_checkpointed_gradients_equal_plain_ones"),
    ("the replay draws other noise",
     "segment, state, use_reentrant=False)",
     "segment, state, use_reentrant=False, preserve_rng_state=False)",
     "test_checkpointed_gradients_equal_plain_ones"),
    ("nothing is computed again",
     "        if checkpoint:\n            logits",
     "        if False:\n            logits",
     "test_checkpointed_gradients_equal_plain_ones"),
    ("a stop forgets the state",
     "    if state is None:\n        state = model.initial_state(len(tokens))\n"
     "    T = model.config.segment_len\n    n_segments",
     "    state = model.initial_state(len(tokens))\n"
     "    T = model.config.segment_len\n    n_segments",
     "test_a_run_that_stops_saves_its_state_and_goes_on_is_one_run"),
    ("last_only returns all logits",
     "    outputs = deque(maxlen=1 if last_only else None)\n    for s in",
     "    outputs = deque()\n    for s in",
     "test_unroll_is_a_loop_over_segments"),
    ("the future leaks through read rows in two hops",
     "now[:n_read, :n_read] = True",
     "now[:n_read] = True",
     "test_no_token_sees_the_future"),
    ("tokens see later tokens",
     "now = now.tril()",
     "now = now.tril(1)",
     "test_no_token_sees_the_future"),
    ("an encoder is causal",
     '"rmt_encoder":     Variant(True,  False, True,      "full")',
     '"rmt_encoder":     Variant(True,  False, True,      "causal")',
     "test_masks_are_those_of_the_papers"),
    ("write rows see the cache",
     "cached[n - n_write:] = False",
     "cached[n - n_write:] = True",
     "test_a_mask_equals_its_picture"),
    ("read rows see the cache",
     "cached[:n_read] = False",
     "cached[:n_read] = True",
     "test_who_looks_at_whom_is_what_the_papers_say"),
    ("gradient flows into the cache",
     "cache = cache.detach().clone()",
     "cache = cache.clone()",
     "test_without_a_learning_state_no_gradient_crosses"),
    ("the cache is one too short",
     "[:, -self.cache_len:]",
     "[:, 1 - self.cache_len:]",
     "test_a_cache_holds_the_last_inputs_of_its_layer_without_memory_or_gradient"),
    ("the cache takes memory rows",
     "        _, tokens, _ = layout.split(x)\n        cache",
     "        tokens = x\n        cache",
     "test_a_cache_holds_the_last_inputs_of_its_layer_without_memory_or_gradient"),
    ("cached and new tokens change places",
     "table[first - n_cache:end]])",
     "table[first - n_cache:end].roll(n_cache, 0)])",
     "test_transformer_xl_with_a_long_cache_equals_one_long_transformer"),
    ("positions turn the wrong way",
     "* rotation[:, None]",
     "* rotation[:, None].conj()",
     "test_attention_equals_loops_over_scores"),
    ("the state lives on the module",
     "            memory = memory + size * rms * torch.randn_like(memory)\n",
     "            memory = memory + size * rms * torch.randn_like(memory)\n"
     "        self.memory.data.copy_(memory[0])\n",
     "test_earlier_segments_count_through_the_state_alone"),
    ("read rows are handed on",
     "self.next_memory(write if self.variant.write else read)",
     "self.next_memory(read)",
     "test_the_next_memory_is_the_written_rows_normed_or_raw"),
    ("raw memory keeps its segment alive",
     "memory = written.clone()",
     "memory = written",
     "test_the_next_memory_is_the_written_rows_normed_or_raw"),
    ("memory skips the norm",
     'if self.config.memory_form == "norm":',
     "if False:",
     "test_memory_is_bounded_for_a_thousand_segments_and_grows_where_it_is_raw"),
    ("all memory rows start as one",
     "std = 0.02  # drawn",
     "std = 0.0  # drawn",
     "test_initial_memory_rows_differ"),
    ("noise in evaluation",
     "if self.training and self.config.memory_noise > 0:",
     "if self.config.memory_noise > 0:",
     "test_dropout_and_noise_act_in_training_alone"),
    ("noise has one size per batch",
     "memory[:, :1, :1])",
     "memory[:1, :1, :1])",
     "test_noise_has_one_size_per_sequence_up_to_its_fraction_of_the_rms"),
    ("memory learns to be small where noise grows with it",
     "rms = memory.detach().square()",
     "rms = memory.square()",
     "test_no_gradient_flows_through_the_size_of_the_noise"),
    ("the write embedding never comes alone",
     "write = self.write_embedding.expand_as(write)",
     "write = write + self.write_embedding",
     "test_write_rows_are_fed_what_write_slot_names"),
    ("tied weights are two that start equal",
     "self.head.weight = self.embed.weight",
     "self.head.weight = nn.Parameter(self.embed.weight.detach().clone())",
     "test_copies_and_state_dicts_give_the_same_logits"),
    ("every layer drops another carry",
     "return t * kept.view(",
     "return t * (torch.rand(len(t)) >= rate).view(",
     "test_carry_dropout_takes_the_whole_carry_of_some_sequences"),
    ("a cache without memory is dropped too",
     "if not (self.training and self.variant.recurrent and rate",
     "if not (self.training and rate",
     "test_carry_dropout_takes_the_whole_carry_of_some_sequences"),
    ("the feed-forward layer never drops out",
     "x = x + self.dropout(self.mlp(self.norm_2(x)))\n        return x, carry",
     "x = x + self.mlp(self.norm_2(x))\n        return x, carry",
     "test_dropout_acts_on_the_embedding_and_on_every_sublayer"),
    ("a controller never drops out",
     "block.dropout(block.attn(h[:, rows], h, narrow))",
     "block.attn(h[:, rows], h, narrow)",
     "test_dropout_acts_on_the_embedding_and_on_every_sublayer"),
    ("a backbone of yours is drawn anew",
     'keep=tuple(f"{name}." for name in yours if yours[name] is not None)',
     "keep=()",
     "test_parts_of_yours_keep_their_weights_and_ours_go_where_they_are"),
    ("a norm of ours comes before a head of yours",
     "**where) if head is None else nn.Identity()",
     "**where)",
     "test_a_head_of_yours_gets_rows_as_the_backbone_leaves_them"),
    ("the controller starts large",
     'if name.endswith(("attn.out.weight", "mlp.2.weight")):',
     'if name.endswith(("attn.out.weight", "mlp.2.weight")) and "controller" not in name:',
     "test_weights_start_at_the_size_that_init_weights_gives_them"),
    ("the controller is never asked",
     "update_memory(self.controller, x",
     "update_memory(self, x",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("tokens pass through the controller too",
     "read = torch.arange(layout.n_read)",
     "read = torch.arange(first_write)",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("tokens see the memory before it is new",
     "super().forward(x.index_copy(1, rows, memory), layout",
     "super().forward(x, layout",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("memory reads the segment twice",
     "        return x.index_copy(1, rows, memory), carry\n\n\nVARIANTS",
     "        return x, carry\n\n\nVARIANTS",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("the window is one wider",
     "near.tril(window).triu(-window)",
     "near.tril(window + 1).triu(-window - 1)",
     "test_a_mask_equals_its_picture"),
    ("a token of a bottleneck sees itself",
     "near.fill_diagonal_(False)",
     "near.fill_diagonal_(True)",
     "test_a_mask_equals_its_picture"),
    ("a bottleneck in causal order has no window",
     "and n_cache == 0 and not self.variant.window",
     "and n_cache == 0",
     "test_controller_and_bottleneck_equal_the_papers_two_steps_row_by_row"),
    ("gradient flows through gamma",
     "gamma = gamma.clamp(0, 1).detach()",
     "gamma = gamma.clamp(0, 1)",
     "test_reads_writes_and_their_gradients_equal_the_equations_in_loops"),
    ("every key is new",
     "gamma = gamma.clamp(0, 1).detach()",
     "gamma = gamma.clamp(1, 1).detach()",
     "test_a_key_written_1_to_5_reads_1_to_5_but_in_hebbian_their_sum"),
    ("a new key is not quite new",
     "return torch.where(known == 0, 1.0, gamma)",
     "return gamma",
     "test_a_published_key_is_new_where_nothing_like_it_was_written"),
    ("z normalises nothing",
     'if self.update == "armt":\n                value',
     "if False:\n                value",
     "test_reads_writes_and_their_gradients_equal_the_equations_in_loops"),
    ("delta keeps the length of its keys",
     'if self.update == "armt":\n            return phi',
     'if self.update != "hebbian":\n            return phi',
     "test_reads_writes_and_their_gradients_equal_the_equations_in_loops"),
    ("the steps of write rows add up",
     "beta = beta / (k @ k.mT @ beta).clamp(min=1)",
     "beta = beta * 1",
     "test_delta_stays_bounded_where_many_write_rows_have_alike_keys"),
    ("hebbian corrects",
     'if self.update != "hebbian":\n                v',
     "if True:\n                v",
     "test_a_key_written_1_to_5_reads_1_to_5_but_in_hebbian_their_sum"),
    ("the memory is read after the norm",
     "self.features(self.w_q(x))",
     "self.features(self.w_q(self.norm_1(x)))",
     "test_a_layer_reads_before_its_first_norm_and_writes_what_comes_out"),
    ("a part of a segment writes",
     "        if layout.n_write > 0:\n            _, _, write = layout.split(x)\n",
     "        if True:\n            write = x[:, -3:]\n",
     "test_a_layer_reads_before_its_first_norm_and_writes_what_comes_out"),
    ("an untrained memory speaks",
     "self.w_v.weight.zero_()",
     "self.w_v.weight.mul_(1)",
     "test_untrained_it_leaves_the_plain_model"),
    ("keys begin elsewhere than queries",
     "self.w_k.weight.copy_(self.w_q.weight)",
     "self.w_k.weight.mul_(1)",
     "test_untrained_it_leaves_the_plain_model"),
    ("the memory is in half precision",
     "dtype = torch.promote_types(self.w_q.weight.dtype, torch.float32)",
     "dtype = self.w_q.weight.dtype",
     "test_z_never_decreases_and_the_memory_stays_in_float32_under_autocast"),
    ("autocast reaches the memory",
     "with torch.autocast(phi.device.type, enabled=False):",
     "with torch.autocast(phi.device.type):",
     "test_z_never_decreases_and_the_memory_stays_in_float32_under_autocast"),
    ("generation never hands memory on",
     "        _, state = model(segment[:, :T], state)\n        segment = new",
     "        segment = new",
     "test_streaming_generation_equals_offline_argmax"),
    ("new rows stand where the first ones stood",
     "row_rotation=whole.row_rotation[start:end]",
     "row_rotation=whole.row_rotation[:end - start]",
     "test_streaming_generation_equals_offline_argmax"),
    ("new tokens see beyond the window",
     "mask=whole.mask[start:end, :last_column]",
     "mask=torch.ones_like(whole.mask[start:end, :last_column])",
     "test_streaming_generation_equals_offline_argmax"),
    ("a new token computes the segment again",
     "kv_cache=self.kv_cache,",
     "kv_cache=None,",
     "test_a_new_token_costs_one_row_and_a_new_segment_one_pass"),
    ("a prompt keeps all its logits",
     "unroll(model, tokens[:, :n_done], state, last_only=True)",
     "unroll(model, tokens[:, :n_done], state)",
     "test_stream_keeps_no_graph_and_no_logits_of_the_prompt"),
    ("generation keeps a graph",
     "@torch.no_grad()\ndef stream",
     "def stream",
     "test_stream_keeps_no_graph_and_no_logits_of_the_prompt"),
    ("top_k is one too many",
     "min(top_k, logits",
     "min(top_k + 1, logits",
     "test_sampling_follows_the_softmax_of_the_most_likely_tokens"),
    ("attention maps are left in place",
     "    finally:\n        F.scaled_dot_product_attention = attend",
     "    finally:\n        pass",
     "test_who_looks_at_whom_is_what_the_papers_say"),
    ("maps show the tokens' step for memory rows",
     "weights = weights.index_copy(-2, memory_rows(layout), of_memory)",
     "pass",
     "test_maps_of_controller_and_bottleneck_have_the_memory_rows_of_the_first_step"),
    ("all layers of a diagonal are the first",
     "self.weight = self.weight[busy.start:busy.stop]",
     "self.weight = self.weight[[0] * len(busy)]",
     "test_diagonals_equal_the_loop_over_segments"),
    ("all layers have the bias of the last",
     "self.bias = self.bias[busy.start:busy.stop]",
     "self.bias = self.bias[[-1] * len(busy)]",
     "test_diagonals_equal_the_loop_over_segments"),
    ("diagonals ignore the depth",
     "if cuts[step - l]:",
     "if False:",
     "test_diagonals_equal_the_loop_over_segments"),
    ("diagonals cut a segment late",
     "if cuts[step - l]:",
     "if cuts[step - l - 1]:",
     "test_diagonals_equal_the_loop_over_segments"),
    ("a short last segment is never cut off",
     "model(segment, state.detach() if cut else state)",
     "model(segment, state)",
     "test_diagonals_equal_the_loop_over_segments"),
    ("states of diagonals keep whole diagonals alive",
     "tree_map(torch.clone, tuple(carry))",
     "tuple(carry)",
     "test_diagonals_equal_the_loop_over_segments"),
]

OTHERS = [  # the story, the file, a fragment of it, what it becomes, the test that notices
]

MUTATIONS = [(story, "rmt.py", *rest) for story, *rest in RMT] + OTHERS


def run_tests(folder, names):
    """Run some tests of test_rmt.py in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-qx", "-m", "", "-p", "no:cacheprovider",
               "test_rmt.py", "-k", " or ".join(names)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def try_out(mutation):
    """Make the change on a copy, run the test that should notice -> what is wrong, or nothing."""
    story, file, old, new, name = mutation
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        return f"{story}: its fragment stands {source.count(old)} times in {file}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=IGNORED)
        (copy / file).write_text(source.replace(old, new), encoding="utf-8")
        result = run_tests(copy, [name])
    noticed = re.search("AssertionError|DID NOT RAISE|^E +assert", result.stdout, re.MULTILINE)
    if result.returncode == 1 and noticed:
        return ""
    return f"{story}: {name} does not notice\n{result.stdout[-2000:]}"


def main():
    """Try all mutations, or those whose story has one of the words given."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m[0] for word in words)]
    names = sorted({name for *_, name in chosen})
    control = run_tests(ROOT, names)
    if control.returncode != 0:
        sys.exit(f"without a mutation the tests must pass:\n{control.stdout[-3000:]}")
    with ThreadPoolExecutor(max_workers=2) as pool:
        problems = [problem for problem in pool.map(try_out, chosen) if problem]
    print("\n".join(problems))
    print(f"{len(chosen) - len(problems)} mutations were noticed, {len(problems)} were not")
    sys.exit(1 if problems or not chosen else 0)


if __name__ == "__main__":
    main()
