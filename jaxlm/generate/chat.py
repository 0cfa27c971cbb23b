"""`jaxlm chat`: a conversation with a model, on the terminal or line by line."""

import os
import signal
import sys
from collections.abc import Iterator

from jaxlm.data.chat import encode_chat, ends_of_answers, open_chat_template
from jaxlm.errors import UserError
from jaxlm.generate.decoding import Generator, Request, Session
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.write import Written

HELP = """/reset     begin anew          /system TEXT   begin anew with these instructions
/seed N    other samples       /quit          leave (or Ctrl-D); Ctrl-C ends an answer"""


class Conversation:
    """
    Attributes:
        messages: what was said, as a chat template takes it.
        interrupted: set it, from a signal handler too, and the answer that is being written ends.
    """

    def __init__(self, run, num_tokens: int, options: Sampling, seed: int = 0, system: str = "", template_options=None):
        name = run.config.data.tokenizer
        self.tokenizer, self.options, self.seed, self.num_tokens = run.data.tokenizer, options, seed, num_tokens
        self.template, self.template_options = open_chat_template(self.tokenizer, name), template_options or {}
        self.stop_ids, self.stop = ends_of_answers(self.template, self.tokenizer, name)
        self.generator = Generator(run.model, self.tokenizer.vocab_size, run.config.seq_len)
        self.session = Session(self.generator, run.params, 1)
        self.interrupted = False
        self.reset(system)

    def reset(self, system: str) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt(self, messages: list[dict]) -> list[int]:
        return encode_chat(self.tokenizer, self.template.render(messages, add_generation_prompt=True, **self.template_options))

    def fit(self) -> tuple[list[int], int]:
        """Leave out the oldest exchanges until an answer has room -> (prompt, messages left out). Raises UserError: the last
        message alone is too long."""
        head, turns, dropped = self.messages[: bool(self.system)], self.messages[bool(self.system) :], 0
        need = min(self.num_tokens, self.generator.seq_len // 4)
        while len(prompt := self.prompt(head + turns[dropped:])) + need > self.generator.seq_len and len(turns) - dropped > 2:
            dropped += 2  # a question and its answer
        self.messages = head + turns[dropped:]
        self.generator.check(Request(prompt, 1, self.options))
        return prompt, dropped

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`, as they come. Raises UserError: it cannot be served; nothing was said then."""
        before, self.interrupted = self.messages, False
        self.messages = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt, dropped = self.fit()
        except UserError:
            self.messages = before
            raise
        if dropped:
            print(f"(the context is full: {dropped} messages at the beginning are left out)", file=sys.stderr)
        room = min(self.num_tokens, self.generator.seq_len - len(prompt))
        written = Written("", self.tokenizer, self.stop, self.stop_ids)
        request = Request(prompt, room, self.options, self.seed + len(self.messages), self.stop_ids)
        (token,) = self.session.add([(0, request)])
        while True:
            yield written.add(token)
            if written.done or self.interrupted:
                break
            (token,) = self.session.step()
        self.session.cancel(0)
        self.messages.append({"role": "assistant", "content": written.text})

    def obey(self, command: str) -> str | None:
        """Do what "/name argument" says -> what to answer; None: leave."""
        name, _, argument = command.partition(" ")
        if name == "/quit":
            return None
        if name == "/seed" and argument.strip().isdecimal():
            self.seed = int(argument)
            return f"(seed {self.seed})"
        if name in ("/reset", "/system"):
            self.reset(self.system if name == "/reset" else argument.strip())
            return "(a new conversation)"
        return HELP


def chat(run, num_tokens: int, options: Sampling, *, seed: int = 0, system: str = "", template_options=None,
         history: str = "") -> None:
    """Read messages until they end, and answer each. On a terminal, `history` is the file that keeps them for the arrow keys.

    Raises UserError where the input is not a terminal: a message that cannot be served.
    """
    conversation, live = Conversation(run, num_tokens, options, seed, system, template_options), sys.stdin.isatty()
    if live:
        print(HELP)
    for line in terminal_lines(history) if live else sys.stdin:
        if line.startswith("/"):
            if (said := conversation.obey(line.strip())) is None:
                break
            print(said, file=sys.stdout if live else sys.stderr)
        elif line.strip():
            try:
                show_answer(conversation, line.rstrip("\n"))
            except UserError as error:
                if not live:
                    raise
                print(f"jaxlm: {error}", file=sys.stderr)


def show_answer(conversation: Conversation, text: str) -> None:
    """Ctrl-C ends it between two tokens: within one, the cache would be lost."""

    def interrupt(number, frame):
        conversation.interrupted = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        for piece in conversation.answer(text):
            print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print()


def terminal_lines(history: str) -> Iterator[str]:
    try:
        import readline
    except ImportError:  # Windows: lines without history
        readline = None
    if readline and history and os.path.isfile(history):
        readline.read_history_file(history)
    try:
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:  # what was typed is dropped
                print()
            except EOFError:
                print()
                return
    finally:
        if readline and history:
            os.makedirs(os.path.dirname(history), exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)
