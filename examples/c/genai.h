/* The part of ONNX Runtime GenAI's C interface that the examples use, for programs that link the library of the
 * Python wheel, which comes without headers. With the NuGet package use its own ort_genai_c.h instead. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct OgaResult OgaResult; /* NULL: it worked */
typedef struct OgaConfig OgaConfig;
typedef struct OgaModel OgaModel;
typedef struct OgaTokenizer OgaTokenizer;
typedef struct OgaTokenizerStream OgaTokenizerStream;
typedef struct OgaSequences OgaSequences;
typedef struct OgaGeneratorParams OgaGeneratorParams;
typedef struct OgaGenerator OgaGenerator;

const char *OgaResultGetError(const OgaResult *);
OgaResult *OgaCreateConfig(const char *folder, OgaConfig **);
OgaResult *OgaConfigClearProviders(OgaConfig *);
OgaResult *OgaConfigAppendProvider(OgaConfig *, const char *provider);
OgaResult *OgaConfigSetProviderOption(OgaConfig *, const char *provider, const char *name, const char *value);
OgaResult *OgaConfigOverlay(OgaConfig *, const char *json);
OgaResult *OgaCreateModelFromConfig(const OgaConfig *, OgaModel **);
OgaResult *OgaCreateTokenizer(const OgaModel *, OgaTokenizer **);
OgaResult *OgaCreateTokenizerStream(const OgaTokenizer *, OgaTokenizerStream **);
OgaResult *OgaCreateSequences(OgaSequences **);
OgaResult *OgaTokenizerEncode(const OgaTokenizer *, const char *text, OgaSequences *);
OgaResult *OgaTokenizerStreamDecode(OgaTokenizerStream *, int32_t token, const char **piece);
const int32_t *OgaSequencesGetSequenceData(const OgaSequences *, size_t index);
size_t OgaSequencesGetSequenceCount(const OgaSequences *, size_t index);
OgaResult *OgaCreateGeneratorParams(const OgaModel *, OgaGeneratorParams **);
OgaResult *OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams *, const char *name, double value);
OgaResult *OgaGeneratorParamsSetSearchBool(OgaGeneratorParams *, const char *name, bool value);
OgaResult *OgaCreateGenerator(const OgaModel *, const OgaGeneratorParams *, OgaGenerator **);
OgaResult *OgaGenerator_AppendTokens(OgaGenerator *, const int32_t *tokens, size_t count);
bool OgaGenerator_IsDone(const OgaGenerator *);
OgaResult *OgaGenerator_GenerateNextToken(OgaGenerator *);
OgaResult *OgaGenerator_GetNextTokens(const OgaGenerator *, const int32_t **tokens, size_t *count);
void OgaDestroyGenerator(OgaGenerator *);
void OgaDestroyGeneratorParams(OgaGeneratorParams *);
void OgaDestroySequences(OgaSequences *);
void OgaDestroyTokenizerStream(OgaTokenizerStream *);
void OgaDestroyTokenizer(OgaTokenizer *);
void OgaDestroyModel(OgaModel *);
void OgaDestroyConfig(OgaConfig *);
void OgaShutdown(void);

#ifdef __cplusplus
}
#endif
