// Answers one question from an artifact, token by token:  Answer FOLDER "QUESTION" [cpu|dml|...]
using System;
using System.IO;
using System.Text;
using Microsoft.ML.OnnxRuntimeGenAI;

internal static class Program
{
    private const int MaxTokens = 200; // of the answer

    private static int Main(string[] args)
    {
        if (args.Length < 2)
        {
            Console.Error.WriteLine("usage: Answer FOLDER QUESTION [cpu|dml|...]");
            return 2;
        }
        Console.OutputEncoding = new UTF8Encoding(false); // Windows' own lacks most of what a model writes
        try
        {
            using (new OgaHandle())
            using (var config = new Config(args[0]))
            {
                if (args.Length > 2)
                {
                    Choose(config, args[0], args[2]);
                }
                Answer(config, args[1]);
            }
            return 0;
        }
        catch (OnnxRuntimeGenAIException error)
        {
            Console.Error.WriteLine($"error: {error.Message}");
            return 1;
        }
    }

    // Another provider than the artifact's own, with the graph that the artifact may have for it.
    private static void Choose(Config config, string folder, string provider)
    {
        config.ClearProviders();
        if (provider != "cpu") // which is what is left without any
        {
            config.AppendProvider(provider);
        }
        if (provider == "dml") // a captured graph wants inputs of one size
        {
            config.SetProviderOption("dml", "enable_graph_capture", "0");
        }
        var overlay = Path.Combine(folder, $"genai_config.{provider}.json");
        if (File.Exists(overlay))
        {
            config.Overlay(File.ReadAllText(overlay));
        }
    }

    private static void Answer(Config config, string question)
    {
        // What the chat template makes of one question without thinking. GenAI's own template engine gets
        // Qwen3.5's template wrong, so the turn is written out here.
        string turn = $"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
        using (var model = new Model(config))
        using (var tokenizer = new Tokenizer(model))
        using (var stream = tokenizer.CreateStream())
        using (var prompt = tokenizer.Encode(turn))
        using (var parameters = new GeneratorParams(model))
        {
            parameters.SetSearchOption("max_length", prompt[0].Length + MaxTokens);
            parameters.SetSearchOption("do_sample", false);
            using (var generator = new Generator(model, parameters))
            {
                generator.AppendTokenSequences(prompt);
                while (!generator.IsDone())
                {
                    generator.GenerateNextToken();
                    Console.Write(stream.Decode(generator.GetNextTokens()[0]));
                }
                Console.WriteLine();
            }
        }
    }
}
