// Answers one question from an artifact, token by token:  answer FOLDER "QUESTION" [cpu|dml|...]
// The artifact is a plain ONNX Runtime GenAI folder; nothing of qwen-edge is needed to run it.
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>

#include "../c/genai.h" // or the NuGet package's ort_genai_c.h

constexpr int max_tokens = 200; // of the answer

void check(OgaResult *result)
{
    if (result != nullptr)
        throw std::runtime_error(OgaResultGetError(result));
}

// What `create`, called with `arguments` and a place for the result, makes; `destroy` takes it away.
template <typename T, typename... Parameters, typename... Arguments>
std::shared_ptr<T> make(OgaResult *(*create)(Parameters...), void (*destroy)(T *), Arguments... arguments)
{
    T *made = nullptr;
    check(create(arguments..., &made));
    return {made, destroy};
}

// Another provider than the artifact's own, with the graph that the artifact may have for it.
void choose(OgaConfig *config, const std::string &folder, const std::string &provider)
{
    check(OgaConfigClearProviders(config));
    if (provider != "cpu") // which is what is left without any
        check(OgaConfigAppendProvider(config, provider.c_str()));
    if (provider == "dml") // a captured graph wants inputs of one size
        check(OgaConfigSetProviderOption(config, "dml", "enable_graph_capture", "0"));
    if (std::ifstream file{folder + "/genai_config." + provider + ".json"}) {
        const std::string overlay{std::istreambuf_iterator<char>{file}, {}};
        check(OgaConfigOverlay(config, overlay.c_str()));
    }
}

void answer(const char *folder, const std::string &question, const std::string &provider)
{
    auto config = make(OgaCreateConfig, OgaDestroyConfig, folder);
    if (!provider.empty())
        choose(config.get(), folder, provider);
    auto model = make(OgaCreateModelFromConfig, OgaDestroyModel, config.get());
    auto tokenizer = make(OgaCreateTokenizer, OgaDestroyTokenizer, model.get());
    auto stream = make(OgaCreateTokenizerStream, OgaDestroyTokenizerStream, tokenizer.get());

    // What the chat template makes of one question without thinking. GenAI's own template engine gets Qwen3.5's
    // template wrong, so the turn is written out here.
    auto prompt = "<|im_start|>user\n" + question + "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    auto tokens = make(OgaCreateSequences, OgaDestroySequences);
    check(OgaTokenizerEncode(tokenizer.get(), prompt.c_str(), tokens.get()));
    size_t count = OgaSequencesGetSequenceCount(tokens.get(), 0);

    auto params = make(OgaCreateGeneratorParams, OgaDestroyGeneratorParams, model.get());
    check(OgaGeneratorParamsSetSearchNumber(params.get(), "max_length", static_cast<double>(count + max_tokens)));
    check(OgaGeneratorParamsSetSearchBool(params.get(), "do_sample", false));
    auto generator = make(OgaCreateGenerator, OgaDestroyGenerator, model.get(), params.get());
    check(OgaGenerator_AppendTokens(generator.get(), OgaSequencesGetSequenceData(tokens.get(), 0), count));
    while (!OgaGenerator_IsDone(generator.get())) {
        const int32_t *next = nullptr;
        const char *piece = nullptr;
        check(OgaGenerator_GenerateNextToken(generator.get()));
        check(OgaGenerator_GetNextTokens(generator.get(), &next, &count));
        check(OgaTokenizerStreamDecode(stream.get(), next[0], &piece)); // an end token is no text
        std::cout << piece << std::flush;
    }
    std::cout << '\n';
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        std::cerr << "usage: " << argv[0] << " FOLDER QUESTION [cpu|dml|...]\n";
        return 2;
    }
    try {
        answer(argv[1], argv[2], argc > 3 ? argv[3] : "");
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    OgaShutdown();
    return 0;
}
