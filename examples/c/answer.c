/* Answers one question from an artifact, token by token:  answer FOLDER "QUESTION" [cpu]
 * The artifact is a plain ONNX Runtime GenAI folder; nothing of qwen-edge is needed to run it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "genai.h"

#define MAX_TOKENS 200 /* of the answer */

static void check(OgaResult *result)
{
    if (result != NULL) {
        fprintf(stderr, "error: %s\n", OgaResultGetError(result));
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: %s FOLDER QUESTION [cpu]\n", argv[0]);
        return 2;
    }
    OgaConfig *config;
    OgaModel *model;
    check(OgaCreateConfig(argv[1], &config));
    if (argc > 3 && strcmp(argv[3], "cpu") == 0) /* where the artifact's own provider is missing */
        check(OgaConfigClearProviders(config));
    check(OgaCreateModelFromConfig(config, &model));

    /* What the chat template makes of one question without thinking. GenAI's own template engine gets Qwen3.5's
     * template wrong, so the turn is written out here. */
    static const char before[] = "<|im_start|>user\n";
    static const char after[] = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    size_t size = sizeof before + strlen(argv[2]) + sizeof after;
    char *prompt = malloc(size);
    if (prompt == NULL)
        return 1;
    snprintf(prompt, size, "%s%s%s", before, argv[2], after);

    OgaTokenizer *tokenizer;
    OgaTokenizerStream *stream;
    OgaSequences *tokens;
    check(OgaCreateTokenizer(model, &tokenizer));
    check(OgaCreateTokenizerStream(tokenizer, &stream));
    check(OgaCreateSequences(&tokens));
    check(OgaTokenizerEncode(tokenizer, prompt, tokens));
    free(prompt);
    size_t count = OgaSequencesGetSequenceCount(tokens, 0);

    OgaGeneratorParams *params;
    OgaGenerator *generator;
    check(OgaCreateGeneratorParams(model, &params));
    check(OgaGeneratorParamsSetSearchNumber(params, "max_length", (double)(count + MAX_TOKENS)));
    check(OgaGeneratorParamsSetSearchBool(params, "do_sample", false));
    check(OgaCreateGenerator(model, params, &generator));
    check(OgaGenerator_AppendTokens(generator, OgaSequencesGetSequenceData(tokens, 0), count));
    while (!OgaGenerator_IsDone(generator)) {
        const int32_t *next;
        const char *piece;
        check(OgaGenerator_GenerateNextToken(generator));
        check(OgaGenerator_GetNextTokens(generator, &next, &count));
        check(OgaTokenizerStreamDecode(stream, next[0], &piece)); /* an end token is no text */
        fputs(piece, stdout);
        fflush(stdout);
    }
    putchar('\n');

    OgaDestroyGenerator(generator);
    OgaDestroyGeneratorParams(params);
    OgaDestroySequences(tokens);
    OgaDestroyTokenizerStream(stream);
    OgaDestroyTokenizer(tokenizer);
    OgaDestroyModel(model);
    OgaDestroyConfig(config);
    OgaShutdown();
    return 0;
}
