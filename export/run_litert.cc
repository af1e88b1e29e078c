// Classifies an image with a .tflite file of `keras-resnet export`, by the C API of LiteRT.
//
//   run_litert model-int8.tflite image.ppm     (PGM for grey images; the size is the model's)
//
// Build: docs/device.md. The file's signature is `serving_default`: one input, uint8 [1, height,
// width, channels], and one output, float32 [1, classes]. `integer` files, which give uint8, are
// refused.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "litert/c/litert_common.h"
#include "litert/c/litert_compiled_model.h"
#include "litert/c/litert_environment.h"
#include "litert/c/litert_model.h"
#include "litert/c/litert_options.h"
#include "litert/c/litert_tensor_buffer.h"
#include "litert/c/litert_tensor_buffer_requirements.h"

namespace {

struct Image {
  int height, width, channels;
  std::vector<uint8_t> pixels;
};

void Check(LiteRtStatus status, const char* what) {
  if (status != kLiteRtStatusOk) {
    throw std::runtime_error(std::string(what) + ": LiteRT status " + std::to_string(status));
  }
}

Image ReadPnm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  Image image;
  int largest = 0;
  file >> kind >> image.width >> image.height >> largest;
  if (!file || (kind != "P5" && kind != "P6") || largest != 255) {
    throw std::runtime_error(path + ": must be a binary PGM or PPM of 8 bits, without comments");
  }
  file.get();
  image.channels = kind == "P6" ? 3 : 1;
  image.pixels.resize(size_t(image.height) * image.width * image.channels);
  file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size());
  if (!file) throw std::runtime_error(path + ": is truncated");
  return image;
}

class Classifier {
 public:
  explicit Classifier(const std::string& path) {
    Check(LiteRtCreateEnvironment(0, nullptr, &environment_), "environment");
    Check(LiteRtCreateModelFromFile(environment_, path.c_str(), &model_), path.c_str());
    LiteRtOptions options;
    Check(LiteRtCreateOptions(&options), "options");
    Check(LiteRtSetOptionsHardwareAccelerators(options, kLiteRtHwAcceleratorCpu), "CPU");
    LiteRtStatus status = LiteRtCreateCompiledModel(environment_, model_, options, &compiled_);
    LiteRtDestroyOptions(options);
    Check(status, path.c_str());
  }

  ~Classifier() {
    if (compiled_) LiteRtDestroyCompiledModel(compiled_);
    if (model_) LiteRtDestroyModel(model_);
    if (environment_) LiteRtDestroyEnvironment(environment_);
  }

  // Returns the probability of each class. Files of any size are resized to the image first.
  std::vector<float> Classify(const Image& image) {
    const int shape[] = {1, image.height, image.width, image.channels};
    Check(LiteRtCompiledModelResizeInputTensor(compiled_, 0, 0, shape, 4),
          "the image has another size than the model's input");
    LiteRtLayout output_layout;
    Check(LiteRtGetCompiledModelOutputTensorLayouts(compiled_, 0, 1, &output_layout, true),
          "output");
    LiteRtRankedTensorType input_type{kLiteRtElementTypeUInt8, {}};
    Check(LiteRtGetCompiledModelInputTensorLayout(compiled_, 0, 0, &input_type.layout), "input");
    LiteRtRankedTensorType output_type{kLiteRtElementTypeFloat32, output_layout};
    LiteRtTensorBuffer input = Buffer(input_type, image.pixels.size());
    size_t classes = output_layout.dimensions[1], bytes;
    LiteRtTensorBufferRequirements needed;
    Check(LiteRtGetCompiledModelOutputBufferRequirements(compiled_, 0, 0, &needed), "output");
    Check(LiteRtGetTensorBufferRequirementsBufferSize(needed, &bytes), "output");
    if (bytes < classes * sizeof(float)) {
      throw std::runtime_error("the model must give float32: integer files do not");
    }
    LiteRtTensorBuffer output = Buffer(output_type, classes * sizeof(float));
    void* memory;
    Check(LiteRtLockTensorBuffer(input, &memory, kLiteRtTensorBufferLockModeWrite), "input");
    std::memcpy(memory, image.pixels.data(), image.pixels.size());
    Check(LiteRtUnlockTensorBuffer(input), "input");
    Check(LiteRtRunCompiledModel(compiled_, 0, 1, &input, 1, &output), "inference");
    std::vector<float> probabilities(classes);
    Check(LiteRtLockTensorBuffer(output, &memory, kLiteRtTensorBufferLockModeRead), "output");
    std::memcpy(probabilities.data(), memory, classes * sizeof(float));
    Check(LiteRtUnlockTensorBuffer(output), "output");
    LiteRtDestroyTensorBuffer(input);
    LiteRtDestroyTensorBuffer(output);
    return probabilities;
  }

 private:
  LiteRtTensorBuffer Buffer(const LiteRtRankedTensorType& type, size_t bytes) {
    LiteRtTensorBuffer buffer;
    Check(LiteRtCreateManagedTensorBuffer(environment_, kLiteRtTensorBufferTypeHostMemory, &type,
                                          bytes, &buffer),
          "tensor buffer");
    return buffer;
  }

  LiteRtEnvironment environment_ = nullptr;
  LiteRtModel model_ = nullptr;
  LiteRtCompiledModel compiled_ = nullptr;
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::cerr << "usage: run_litert MODEL.tflite IMAGE.ppm\n";
    return 2;
  }
  try {
    std::vector<float> probabilities = Classifier(words[1]).Classify(ReadPnm(words[2]));
    // labels.txt beside the model has the name of each class, a line each.
    for (size_t label = 0; label < probabilities.size(); ++label) {
      std::cout << label << " " << probabilities[label] << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << "run_litert: " << error.what() << "\n";
    return 2;
  }
}
