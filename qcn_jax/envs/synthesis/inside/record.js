// What the function of a defect was given and how it ended, a line for each call; CALLS, MOST, LONGEST, FS, UTIL
// are filled in.
var __qcnCount = 0;
var __qcnWithin = false;
function __qcn(names, values, receiver, run) {
  if (__qcnWithin || __qcnCount >= MOST) return run();
  const call = { args: [], after: [], raised: '', result: [], values: null };
  const note = () => names.map((name, at) => [name, __qcnText(values[at])]);
  let good = true;
  try {
    call.args = note();
    if (receiver) call.args.unshift(['self', UTIL.inspect(receiver, { depth: 2, breakLength: Infinity })]);
    call.values = JSON.stringify(values);
  } catch (error) { good = false; }
  const write = () => {
    __qcnWithin = true;
    try {
      call.after = note();
      const all = [...call.args, ...call.after, ['', call.result[0] ?? '']];
      if (good && all.every(([, text]) => text !== null && text.length <= LONGEST)) {
        __qcnCount += 1;
        FS.appendFileSync('CALLS', JSON.stringify(call) + '\n');
      }
    } catch (error) { /* of the recorder */ } finally { __qcnWithin = false; }
  };
  let result;
  try {
    result = run();
  } catch (error) {
    call.raised = error instanceof Error ? `${error.name}: ${error.message}` : `thrown ${__qcnText(error)}`;
    write();
    throw error;
  }
  call.result = [__qcnText(result)];
  write();
  return result;
}
