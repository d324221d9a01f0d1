"""The stop button: a real kernel is interrupted in the middle of each panel's move."""

import time

from jupyter_client.manager import start_new_kernel

SET_UP = """
import time, torch
from lora_helpers import *
from torch.utils.data import TensorDataset
mnist, base = load_mnist(), pretrained_base()
mnist = Mnist(*(TensorDataset(*(t[:3000] for t in part.tensors)) for part in (mnist.train, mnist.test)))
explorer, inspector, lab = LoRAExplorer(base, mnist), ParametrizationInspector(), ScalingLab(base, mnist)
pad, net = DigitPad(explorer), freeze_base(add_lora(pretrained_base(), rank=4))
bits = {name: tensor.clone() for name, tensor in base.state_dict().items()}

def slowly(panel):  # computes once as if the machine were slow
    quick = panel.compute
    def slow(*state):
        panel.compute = quick
        time.sleep(60)
    panel.compute = slow
"""
MOVES = {  # what is interrupted, and what then must hold, after the same move has been made again
    "explorer.move({'rank': 64, 'batches': 300})": (
        "explorer.result.setting == explorer.setting == Setting(rank=64, batches=300)"
        " and all(explorer.proofs.values())"
    ),
    "explorer.presets['rehearse the other digits'].click()": "explorer.result.setting == Setting(share=0.5)",
    "lab.alpha = 0.5": "lab.results[64].setting.alpha == 0.5 and ' · α 0.5 · ' in lab.summary",
    "slowly(inspector); inspector.steps = 200": "'after 200 steps' in inspector.summary",
    "slowly(pad); pad.index = 8": "'test image 8' in pad.summary",
}
CHECK = """
{move}
assert {holds}
assert not any(panel.status for panel in (explorer, inspector, lab, pad))
assert all(torch.equal(tensor, bits[name]) for name, tensor in base.state_dict().items())
"""
TRAINING = "train(net, mnist.train, epochs=100)"


def test_each_panel_is_usable_after_an_interrupt_in_mid_move():
    manager, client = start_new_kernel()
    try:
        run(client, SET_UP)
        for move, holds in MOVES.items():
            panel = move.removeprefix("slowly(").split(")")[0].split(".")[0]
            before = run(client, f"print({panel}.summary)")
            assert "KeyboardInterrupt" in interrupt(manager, client, move)
            said = run(client, f"print({panel}.summary, {panel}.status, sep='')")
            assert said == before.strip() + "Interrupted. Set the value again.\n", (
                "controls and picture go back"
            )
            run(client, CHECK.format(move=move.split("; ")[-1], holds=holds))
        assert "Stopped after " in interrupt(manager, client, TRAINING)
        run(client, "train(net, mnist.train, max_batches=2, progress=False); evaluate(net, mnist.test)")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run(client, code: str) -> str:
    said = []

    def note(message):
        said.append(message["content"].get("text", ""))

    content = client.execute_interactive(code, timeout=180, output_hook=note)["content"]
    assert content["status"] == "ok", (code, content)
    return "".join(said)


def interrupt(manager, client, code: str) -> str:
    """Runs `code`, presses stop in the middle of it, and returns what it said."""
    client.execute(code)
    while client.get_iopub_msg(timeout=60)["content"].get("execution_state") != "busy":
        pass
    time.sleep(0.4)
    manager.interrupt_kernel()
    client.get_shell_msg(timeout=60)
    said = ""
    while (content := client.get_iopub_msg(timeout=60)["content"]).get("execution_state") != "idle":
        said += content.get("text", "") + content.get("ename", "")
    return said
