// Vectors with Cohere's client for JavaScript; the arguments are the server's address and a JSON list of texts.

import { CohereClient, CohereClientV2, CohereError } from "cohere-ai";
const [url, texts] = [process.argv[1], JSON.parse(process.argv[2])];
const options = { token: "none", environment: url, baseUrl: url };
const [one, two] = [new CohereClient(options), new CohereClientV2(options)];
const types = ["float", "int8", "ubinary"];
const second = await two.embed({ model: "m", texts, inputType: "search_document", embeddingTypes: types });
const first = await one.embed({ texts, inputType: "search_query" });
let refused = "";
try {
  await two.embed({ model: "m", texts: [], inputType: "search_document" });
} catch (error) {
  refused = error instanceof CohereError ? `${error.statusCode} ${error.message}` : `not Cohere's: ${error}`;
}
console.log(JSON.stringify({ first, second, refused }));
