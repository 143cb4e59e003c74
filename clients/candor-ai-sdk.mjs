// Vercel's AI SDK, with the verdict in providerMetadata.candor; `openai-compatible` alone lets a metadata extractor in.
//
//   const candor = createCandor({ baseURL: 'http://127.0.0.1:8000/v1', reliability: { mode: 'abstain' } });
//   const { text, providerMetadata } = await generateText({ model: candor('word-ordering'), prompt: '...' });
//   providerMetadata.candor.reliability.results[0].region
//
// A withheld answer's text is the refusal and its finishReason is 'content-filter', whole and streamed.
// Copy this file; it needs @ai-sdk/openai-compatible alone.

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';

const shown = (reliability) => (reliability ? { candor: { reliability } } : undefined);

const metadataExtractor = {
  extractMetadata: async ({ parsedBody }) => shown(parsedBody?.reliability),
  createStreamExtractor: () => {
    let found;
    return {
      processChunk: (chunk) => {
        found = chunk?.reliability ?? found;
      },
      buildMetadata: () => shown(found),
    };
  },
};

export function createCandor({ reliability, ...settings }) {
  return createOpenAICompatible({
    name: 'candor',
    supportsStructuredOutputs: true,
    metadataExtractor,
    transformRequestBody: (body) => (reliability ? { ...body, reliability } : body),
    ...settings,
  });
}
