"""From tokens to text: stop strings, end tokens, length, and the Deltas that a client sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from loramux.engine.plan import Sampled
from loramux.engine.sequence import Sequence
from loramux.models.text import Detokenizer, TextProcessor
from loramux.types import Delta, FinishReason, TokenLogprob, TokenLogprobs


@dataclass(slots=True)
class _Answer:
    text: TextProcessor
    detokenizer: Detokenizer | None  # None: tokens only
    held: str = ""  # text that may be the start of a stop string
    tokens: list[int] = field(default_factory=list)  # not yet given out
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class AnswerWriter:
    """Keeps the text of every answer that is being written."""

    def __init__(self, text: TextProcessor, eos_ids: frozenset[int], max_model_len: int):
        self._text = text
        self._eos_ids = eos_ids
        self._max_model_len = max_model_len
        self._answers: dict[int, _Answer] = {}

    def open(self, sequence: Sequence) -> None:
        """Start the answer of `sequence`; also fixes which tokens end it, and how long it can be."""
        params = sequence.request.params
        text: TextProcessor = sequence.request.text or self._text
        own = {i for i in [text.eos_token_id] if i is not None and text is not self._text}
        eos = () if params.ignore_eos else tuple(self._eos_ids | own)
        sequence.stop_ids = (*eos, *params.stop_token_ids)
        sequence.max_length = min(sequence.max_length, self._max_model_len)
        detokenizer = None
        if params.detokenize:
            detokenizer = Detokenizer(
                text,
                sequence.request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
            )
        self._answers[sequence.sequence_id] = _Answer(text, detokenizer)

    def close(self, sequence: Sequence) -> None:
        self._answers.pop(sequence.sequence_id, None)

    def add(self, sequence: Sequence, sampled: Sampled) -> Delta | None:
        """Book one token. The Delta is None while its text may yet become a stop string."""
        answer = self._answers[sequence.sequence_id]
        answer.tokens.append(sampled.token_id)
        params = sequence.request.params
        if (logprobs := sampled.logprobs) is not None:
            answer.logprobs.append(
                _decode_logprobs(answer.text, logprobs) if params.detokenize else logprobs
            )
        if sampled.token_id in sequence.stop_ids:
            return self._stop_at_token(sequence, answer, sampled.token_id)
        reason: FinishReason | None = None
        if sequence.num_tokens >= sequence.max_length:
            reason = "length"
        if answer.detokenizer is None:
            return self._give(sequence, answer, 0, reason)
        piece = answer.detokenizer.add(sampled.token_id)
        if reason is not None:
            piece += answer.detokenizer.flush()
        answer.held += piece
        may_stop = bool(params.stop) and sequence.num_output > params.min_tokens
        if may_stop and (found := _find_stop(answer.held, params.stop, len(piece))):
            at, stop = found
            end = at + len(stop) if params.include_stop_str_in_output else at
            answer.held = answer.held[:end]
            return self._give(sequence, answer, len(answer.held), "stop", stop)
        ready = len(answer.held)
        if params.stop and reason is None:
            ready -= _possible_stop(answer.held, params.stop)
            if ready == 0:
                return None
        return self._give(sequence, answer, ready, reason)

    def _stop_at_token(self, sequence: Sequence, answer: _Answer, token_id: int) -> Delta:
        params = sequence.request.params
        explicit = token_id in params.stop_token_ids
        if (detokenizer := answer.detokenizer) is not None:
            answer.held += detokenizer.flush()
            if params.include_stop_str_in_output or (explicit and not params.skip_special_tokens):
                answer.held += detokenizer.add(token_id)
        return self._give(
            sequence, answer, len(answer.held), "stop", token_id if explicit else None
        )

    def _give(
        self,
        sequence: Sequence,
        answer: _Answer,
        ready: int,
        reason: FinishReason | None,
        stop: int | str | None = None,
    ) -> Delta:
        text, answer.held = answer.held[:ready], answer.held[ready:]
        tokens, answer.tokens = tuple(answer.tokens), []
        logprobs, answer.logprobs = tuple(answer.logprobs), []
        return Delta(
            request_id=sequence.request.request_id,
            index=sequence.index,
            text=text,
            token_ids=tokens,
            logprobs=logprobs if sequence.request.params.logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop,
            num_cached_tokens=sequence.num_cached,
        )


def _decode_logprobs(text: TextProcessor, entry: TokenLogprobs) -> TokenLogprobs:
    def named(item: TokenLogprob) -> TokenLogprob:
        return replace(item, decoded_token=text.decode([item.token_id]))

    return TokenLogprobs(named(entry.chosen), tuple(named(item) for item in entry.top))


def _find_stop(text: str, stops: tuple[str, ...], new: int) -> tuple[int, str] | None:
    """(position, stop) of the first stop string that ends in the last `new` characters of `text`."""
    found = []
    for stop in stops:
        start = max(0, len(text) - new - len(stop) + 1)
        if (at := text.find(stop, start)) >= 0:
            found.append((at, stop))
    return min(found) if found else None


def _possible_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
