/* Answers one question from an artifact, token by token:  answer FOLDER "QUESTION" [cpu|dml|...]
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

/* Another provider than the artifact's own, with the graph that the artifact may have for it. */
static void choose(OgaConfig *config, const char *folder, const char *provider)
{
    check(OgaConfigClearProviders(config));
    if (strcmp(provider, "cpu") != 0) /* which is what is left without any */
        check(OgaConfigAppendProvider(config, provider));
    if (strcmp(provider, "dml") == 0) /* a captured graph wants inputs of one size */
        check(OgaConfigSetProviderOption(config, "dml", "enable_graph_capture", "0"));
    static char text[1 << 16]; /* an overlay has a few kilobytes */
    snprintf(text, sizeof text, "%s/genai_config.%s.json", folder, provider);
    FILE *file = fopen(text, "rb");
    if (file == NULL)
        return; /* it takes the main graph */
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    check(OgaConfigOverlay(config, text));
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: %s FOLDER QUESTION [cpu|dml|...]\n", argv[0]);
        return 2;
    }
    OgaConfig *config;
    OgaModel *model;
    check(OgaCreateConfig(argv[1], &config));
    if (argc > 3)
        choose(config, argv[1], argv[3]);
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
