import copy
import resource

import pytest

from rlhf.data import rendering
from rlhf.data.encoding import encode_comparison, encode_dialogue, encode_prompt, encode_response, fit_prompt
from rlhf.data.end_tokens import end_of_turn_id
from rlhf.data.records import Comparison, Message
from rlhf.errors import UserError

DIALOGUE = [
    Message("system", "Be brief."),
    Message("user", "Hello!"),
    Message("assistant", "Hi there."),
    Message("user", "Where does Mia live?"),
    Message("assistant", "Mia lives in Rome."),
]


def trained(tokenizer, encoded):
    return tokenizer.decode([index for index, counts in zip(encoded.ids, encoded.mask, strict=True) if counts])


def test_mask_covers_the_assistant_and_its_end_of_turn(tokenizer):
    encoded = encode_dialogue(tokenizer, DIALOGUE)
    assert trained(tokenizer, encoded) == "Hi there.<|end|>Mia lives in Rome.<|end|>"
    assert tokenizer.decode(encoded.ids) == rendering.render(tokenizer, DIALOGUE)


def test_mask_with_newlines_after_turns_and_pad_equal_to_end_of_turn(chatml):
    assert chatml.pad_token_id == chatml.eos_token_id == end_of_turn_id(chatml)
    encoded = encode_dialogue(chatml, DIALOGUE)
    assert trained(chatml, encoded) == "Hi there.<|im_end|>Mia lives in Rome.<|im_end|>"
    assert rendering.render(chatml, DIALOGUE) == chatml.decode(encoded.ids) + "\n"  # only the last newline is left out


@pytest.mark.parametrize("name", ["tokenizer", "chatml"])
def test_training_reads_the_tokens_of_generation(name, request):
    tokenizer = request.getfixturevalue(name)
    encoded = encode_dialogue(tokenizer, DIALOGUE)
    prompt = encode_prompt(tokenizer, DIALOGUE[:-1])
    response = encode_response(tokenizer, DIALOGUE[-1].content)
    assert encoded.ids == prompt + response
    assert encoded.mask[len(prompt) :] == [True] * len(response)
    assert response[-1] == end_of_turn_id(tokenizer)


def test_no_token_spans_prompt_and_response(tokenizer):
    # "Mia lives" after a space would merge into " Mia": tokenised separately, it cannot.
    response = encode_response(tokenizer, "Mia lives")
    assert (
        encode_prompt(tokenizer, DIALOGUE[:2]) + response
        == encode_dialogue(tokenizer, [*DIALOGUE[:2], Message("assistant", "Mia lives")]).ids
    )


def test_empty_response_is_one_token(tokenizer):
    assert encode_response(tokenizer, "") == [end_of_turn_id(tokenizer)]


def test_a_long_dialogue_is_truncated_on_the_right(tokenizer):
    whole = encode_dialogue(tokenizer, DIALOGUE)
    cut = encode_dialogue(tokenizer, DIALOGUE, max_length=10)
    assert (cut.ids, cut.mask) == (whole.ids[:10], whole.mask[:10])


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    old = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}" + old
    try:
        with pytest.raises(UserError, match="rewrites earlier turns"):
            encode_dialogue(tokenizer, DIALOGUE)
        tokenizer.chat_template = None
        with pytest.raises(UserError, match=r"model\.chat_template"):
            encode_prompt(tokenizer, DIALOGUE[:2])
    finally:
        tokenizer.chat_template = old


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("x", "does not render the content of an assistant turn"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_template_that_omits_the_response_or_recurses_is_refused(tokenizer, template, said):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    with pytest.raises(UserError, match=said) as caught:
        end_of_turn_id(own)
    assert "\n" not in str(caught.value)


def test_template_without_end_of_turn_is_refused(tokenizer):
    old = tokenizer.chat_template
    tokenizer.chat_template = "{%- for m in messages -%}{{ m['content'] }}{%- endfor -%}"
    try:
        with pytest.raises(UserError, match="no policy can be trained to stop"):
            end_of_turn_id(tokenizer)
    finally:
        tokenizer.chat_template = old


def test_prompt_too_long_loses_its_oldest_turns_and_keeps_the_system_message(tokenizer):
    short = encode_prompt(tokenizer, [DIALOGUE[0], DIALOGUE[3]])
    assert fit_prompt(tokenizer, DIALOGUE[:4], len(short)) == (short, True)
    assert fit_prompt(tokenizer, DIALOGUE[:4], len(short) - 1) == (None, True)
    assert fit_prompt(tokenizer, DIALOGUE[:4], None) == (encode_prompt(tokenizer, DIALOGUE[:4]), False)


def test_responses_of_a_comparison_are_never_truncated(tokenizer):
    comparison = Comparison(tuple(DIALOGUE[:4]), ("Rome.", "Mia lives in Rome. I hope that helps."))
    encoded, cut = encode_comparison(tokenizer, comparison)
    assert not cut and encoded is not None
    assert [row[-1] for row in encoded.responses] == [end_of_turn_id(tokenizer)] * 2
    shorter, cut = encode_comparison(tokenizer, comparison, max_length=len(encoded) - 1)
    assert cut and shorter is not None and shorter.responses == encoded.responses
    assert encode_comparison(tokenizer, comparison, max_length=len(encoded.responses[1])) == (None, True)


def test_any_string_can_be_encoded(tokenizer):
    for text in ("naïve 中文 🙂", " leading", "tab\tnew\nline", "Mia"):
        assert tokenizer.decode(encode_response(tokenizer, text)[:-1]) == text


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{{ '%9999999999d' % messages|length }}",
        "{{ messages[0]['content'].center(9999999999) }}",
        "{{ (messages * 9999999999)|length }}",
        "{{ ' ' * 2000000 }}",
    ],
)
def test_an_endless_template_is_refused_at_its_first_use(tokenizer, monkeypatch, endless):
    """Not once for every dialogue that is tried to learn the template's own tokens."""
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.2)
    before, used = resource.getrlimit(resource.RLIMIT_AS), []
    own = copy.deepcopy(tokenizer)
    own.chat_template = endless
    render = own.apply_chat_template
    own.apply_chat_template = lambda *args, **options: used.append(args) or render(*args, **options)
    with pytest.raises(rendering.TemplateUnbounded, match="type model.chat_template=chatml"):
        encode_prompt(own, DIALOGUE[:2])
    assert len(used) == 1 and resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_long_dialogue_is_rendered_in_full(tokenizer):
    words = "word " * 300_000
    assert rendering.render(tokenizer, [Message("user", words)]).count("word") == 300_000
