"""OpenAI's own client against the server at argv[1] (with /v1), token argv[2]."""
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0, timeout=60)
model = client.models.list().data[0].id
messages = [
    {"role": "system", "content": "You are a poet."},
    {"role": "user", "content": "Write a poem on NVIDIA in the style of Shakespeare"},
]

chat = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40)
content = chat.choices[0].message.content
assert content and chat.choices[0].finish_reason in ("stop", "length"), chat
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens, chat

stream = client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
)
text, usage, reasons = "", None, []
for chunk in stream:
    for choice in chunk.choices:
        text += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    usage = chunk.usage or usage
assert (text, usage, reasons) == (content, chat.usage, [chat.choices[0].finish_reason]), (text, usage, reasons)

with client.chat.completions.stream(model=model, messages=messages, temperature=0) as events:
    for event in events:
        pass
whole = events.get_final_completion().choices[0]
assert whole.message.content.startswith(content) and whole.finish_reason == "stop", whole

chat = client.chat.completions.create(
    model=model, messages=messages, seed=7, n=3, max_completion_tokens=8, temperature=1.5, logprobs=True, top_logprobs=2
)
assert [choice.index for choice in chat.choices] == [0, 1, 2]
assert all(len(token.top_logprobs) == 2 for choice in chat.choices for token in choice.logprobs.content)
again = client.chat.completions.create(
    model=model, messages=messages, seed=7, n=3, max_completion_tokens=8, temperature=1.5
)
assert [c.message.content for c in again.choices] == [c.message.content for c in chat.choices]

done = client.completions.create(model=model, prompt=["To be", "Or not"], max_tokens=6, temperature=0, logprobs=2)
for choice in done.choices:
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) <= 6, choice
    assert "".join(logprobs.tokens) == choice.text and all(value <= 0 for value in logprobs.token_logprobs), choice
word = done.choices[0].text.split()[-1]
cut = client.completions.create(model=model, prompt="To be", max_tokens=6, temperature=0, stop=[word])
assert cut.choices[0].finish_reason == "stop" and word not in cut.choices[0].text, cut
bias = client.completions.create(model=model, prompt="To be", max_tokens=6, logit_bias={"3": 100}, temperature=0)
assert bias.choices[0].text == "", bias
penalised = client.completions.create(model=model, prompt="a", max_tokens=6, presence_penalty=1, frequency_penalty=1)
assert penalised.usage.completion_tokens <= 6

for expected, arguments in [
    (openai.BadRequestError, {"temperature": -1}),
    (openai.BadRequestError, {"max_tokens": 10**6}),
    (openai.BadRequestError, {"stop": [""]}),
]:
    try:
        client.chat.completions.create(model=model, messages=messages, **arguments)
    except expected as error:
        assert error.body["message"] and error.type == "invalid_request_error", error.body
    else:
        raise AssertionError(arguments)
try:
    openai.OpenAI(base_url=sys.argv[1], api_key="wrong", max_retries=0).models.list()
except openai.AuthenticationError:
    pass
else:
    raise AssertionError("a wrong token is taken")
print(whole.message.content)
