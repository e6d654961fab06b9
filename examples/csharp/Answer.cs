// Answers one question from an artifact, token by token:  Answer FOLDER "QUESTION" [cpu]
using System;
using Microsoft.ML.OnnxRuntimeGenAI;

if (args.Length < 2)
{
    Console.Error.WriteLine("usage: Answer FOLDER QUESTION [cpu]");
    return 2;
}

const int maxTokens = 200; // of the answer
try
{
    using var handle = new OgaHandle();
    using var config = new Config(args[0]);
    if (args.Length > 2 && args[2] == "cpu") // where the artifact's own provider is missing
    {
        config.ClearProviders();
    }
    using var model = new Model(config);
    using var tokenizer = new Tokenizer(model);
    using var stream = tokenizer.CreateStream();

    // What the chat template makes of one question without thinking. GenAI's own template engine gets Qwen3.5's
    // template wrong, so the turn is written out here.
    using var prompt = tokenizer.Encode(
        $"<|im_start|>user\n{args[1]}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");

    using var parameters = new GeneratorParams(model);
    parameters.SetSearchOption("max_length", prompt[0].Length + maxTokens);
    parameters.SetSearchOption("do_sample", false);
    using var generator = new Generator(model, parameters);
    generator.AppendTokenSequences(prompt);
    while (!generator.IsDone())
    {
        generator.GenerateNextToken();
        Console.Write(stream.Decode(generator.GetSequence(0)[^1]));
    }
    Console.WriteLine();
    return 0;
}
catch (OnnxRuntimeGenAIException error)
{
    Console.Error.WriteLine($"error: {error.Message}");
    return 1;
}
