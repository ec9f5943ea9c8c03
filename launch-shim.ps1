# Start the shim, the server that Claude Code talks to.
# Finds Python 3.9 or newer and passes every argument on; all else is in qwencode.py.
$ErrorActionPreference = 'Continue'
$program = Join-Path $PSScriptRoot 'qwencode.py'
$newEnough = 'import sys; sys.exit(sys.version_info < (3, 9))'
$names = 'python3', 'python', 'python3.13', 'python3.12', 'python3.11', 'python3.10', 'python3.9', 'py'
foreach ($name in $names) {
    $found = Get-Command $name -CommandType Application -ErrorAction SilentlyContinue
    $python = $found | Select-Object -First 1
    if (-not $python) { continue }
    $which = @()
    if ($name -eq 'py') { $which = @('-3') }
    & $python.Path @which -c $newEnough 2>&1 | Out-Null
    if ($LASTEXITCODE -ne 0) { continue }
    & $python.Path @which $program @args
    exit $LASTEXITCODE
}
[Console]::Error.WriteLine('launch-shim: Python 3.9 or newer is needed, and python3, python and py are not that.')
[Console]::Error.WriteLine('Install it from https://www.python.org/downloads/ or with: winget install Python.Python.3.13')
exit 127
