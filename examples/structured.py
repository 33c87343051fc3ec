"""An answer that is JSON of a given shape, whatever the model would like to say (the extra `structured`)."""

import json

from tinyserve import LLM, SamplingParams, StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Norway", "Japan"]}},
    "required": ["city", "country"],
}

llm = LLM("smollm2-135m")
question = [{"role": "user", "content": "In which country is Paris? Answer in JSON with city and country."}]
params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=StructuredOutputs(json=SCHEMA))
print(json.loads(llm.chat(question, params)[0].outputs[0].text))
