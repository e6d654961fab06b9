/* Wine 8 lacks this DLL of Windows; onnxruntime-genai.dll takes one function from it. For tests only. */
#include <windows.h>
#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(BYTE *buffer, SIZE_T size)
{
    return RtlGenRandom(buffer, (ULONG)size);
}
