#!/usr/bin/env bash
# Make .venv and install VARL into it. Does nothing when nothing changed. By uv, which is quick; by pip where uv cannot be had or cannot do it.
#   EXTRAS=dev|demo|words   what to install (default: dev)      PYTHON=python3.12   which interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
py=${PYTHON:-python3} extras=${EXTRAS:-dev} venv=.venv
want=$(cat pyproject.toml constraints.txt scripts/setup.sh <(echo "$extras $PWD") | sha256sum)
if [ "$(cat $venv/.installed 2>/dev/null)" != "$want" ]; then
  "$py" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "VARL needs Python 3.11 or newer; $py is $("$py" -V). Set PYTHON=python3.12, say." >&2; exit 2; }
  [ -x $venv/bin/python ] || "$py" -m venv $venv
  vpy=$venv/bin/python
  # a local folder of wheels, if this machine's pip is set up with one (uv does not read pip's settings)
  links=${PIP_FIND_LINKS:-$("$vpy" -m pip config get global.find-links 2>/dev/null || true)}
  [ -z "$links" ] || export UV_FIND_LINKS="$links"
  packages=(-c constraints.txt -e ".[$extras]")
  { "$vpy" -m pip install -q --disable-pip-version-check "uv>=0.9,<1" && "$vpy" -m uv pip install -q --compile-bytecode --python "$vpy" "${packages[@]}"; } 2>/dev/null ||
    "$vpy" -m pip install -q --disable-pip-version-check "${packages[@]}"
  echo "$want" > $venv/.installed
fi
# Tesseract's language data is a 4 MB system package. Without it VARL falls back to the OCR engine that pip brings, and says so.
have=
for folder in "${TESSDATA_PREFIX:-/usr/share/tessdata}" /usr/share/tesseract-ocr/*/tessdata /usr/share/tessdata /usr/local/share/tessdata /opt/homebrew/share/tessdata; do
  [ ! -f "$folder/eng.traineddata" ] || have=yes
done
if [ -z "$have" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing tesseract-ocr-eng (language data of the OCR reward)"
    (apt-get install -y -qq tesseract-ocr-eng || { apt-get update -qq && apt-get install -y -qq tesseract-ocr-eng; }) >/dev/null 2>&1 ||
      echo "could not install tesseract-ocr-eng: the reward will use RapidOCR, which is slower" >&2
  else
    echo "Tesseract's English data is missing; the reward will use RapidOCR, which is slower. To mend: apt-get install tesseract-ocr-eng" >&2
  fi
fi
