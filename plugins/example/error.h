// Errors, with the exit codes of evit-deploy's commands.
#pragma once

#include <stdexcept>
#include <string>

namespace evit {

enum class Exit { kOk = 0, kCheckFailed = 1, kInput = 2, kEnvironment = 3, kStage = 4 };

class Error : public std::runtime_error {
 public:
  // `where` is a file, option or field; `what` a clause without a full stop; `fix` a sentence.
  Error(Exit code, const std::string& where, const std::string& what, const std::string& fix = "")
      : std::runtime_error((where.empty() ? "" : where + ": ") + what + "." + (fix.empty() ? "" : " " + fix)),
        code_(code) {}

  Exit code() const { return code_; }

 private:
  Exit code_;
};

}  // namespace evit
