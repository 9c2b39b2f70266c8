// Drives @jupyterlab/services, JupyterLab's own client library, against a server: one line of JSON for each check.
// node services.mjs MODULES URL TOKEN KERNEL [CHECK...]
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';

const [modules, url, token, kernelName, ...selected] = process.argv.slice(2);
const require = createRequire(modules + '/');
const { KernelAPI, KernelManager, KernelSpecAPI, ServerConnection, SessionAPI, SessionManager } =
  require('@jupyterlab/services');

const V1 = 'v1.kernel.websocket.jupyter.org';
const TIMEOUT = 60_000;
const serverSettings = ServerConnection.makeSettings({
  baseUrl: url,
  wsUrl: url.replace('http', 'ws'),
  token,
  appendToken: true
});
const manager = new KernelManager({ serverSettings });
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));

async function within(promise, what, ms = TIMEOUT) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: nothing within ${ms} ms`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

async function until(condition, what, ms = TIMEOUT) {
  const end = Date.now() + ms;
  while (!(await condition())) {
    if (Date.now() > end) throw new Error(`${what}: not within ${ms} ms`);
    await sleep(20);
  }
}

// Execute a cell; returns its IOPub messages and its reply.
async function run(kernel, code, { onStdin, ...options } = {}) {
  const future = kernel.requestExecute({ code, allow_stdin: onStdin !== undefined, ...options });
  const messages = [];
  future.onIOPub = message => {
    messages.push(message);
  };
  if (onStdin) future.onStdin = message => onStdin(future, message);
  const reply = await within(future.done, code.slice(0, 60));
  return { messages, reply };
}

const textOf = (messages, name = 'stdout') =>
  messages
    .filter(message => message.header.msg_type === 'stream' && message.content.name === name)
    .map(message => message.content.text)
    .join('');
const typesOf = messages => messages.map(message => message.header.msg_type);

async function withKernel(work) {
  const kernel = await within(manager.startNew({ name: kernelName }), 'a kernel');
  try {
    await within(kernel.info, 'kernel_info_reply');
    await work(kernel);
  } finally {
    if (!kernel.isDisposed) await within(kernel.shutdown(), 'shutdown');
  }
}

// A comm target that answers with its buffers reversed.
const ECHO = `
import comm
def _opened(it, message):
    def answer(message):
        it.send({"count": len(message["buffers"])}, buffers=[bytes(buffer)[::-1] for buffer in message["buffers"]])
    it.on_msg(answer)
comm.get_comm_manager().register_target("echo", _opened)
`;

const checks = {
  async kernelspecs() {
    const found = await KernelSpecAPI.getSpecs(serverSettings);
    const spec = found.kernelspecs[kernelName];
    assert.ok(spec, Object.keys(found.kernelspecs).join());
    assert.ok(found.default in found.kernelspecs);
    assert.equal(spec.language, 'python');
    const [logo] = Object.values(spec.resources);
    const address = new URL(logo, url);
    const answer = await ServerConnection.makeRequest(address.href, {}, serverSettings);
    assert.equal(answer.status, 200);
    assert.match(answer.headers.get('content-type'), /^image\//);
  },

  async execution() {
    await withKernel(async kernel => {
      assert.equal(kernel._ws.protocol, V1);
      const statuses = [];
      kernel.statusChanged.connect((_, status) => statuses.push(status));
      const code = 'import sys\nprint("out")\nprint("err", file=sys.stderr)\ndisplay({"a": 1})\n6 * 7';
      const { messages, reply } = await run(kernel, code);
      assert.equal(reply.content.status, 'ok');
      assert.equal(reply.content.execution_count, 1);
      assert.deepEqual([typesOf(messages)[0], typesOf(messages)[1]], ['status', 'execute_input']);
      assert.equal(typesOf(messages).at(-1), 'status');
      assert.equal(textOf(messages), 'out\n');
      assert.equal(textOf(messages, 'stderr'), 'err\n');
      const result = messages.find(message => message.header.msg_type === 'execute_result');
      assert.equal(result.content.data['text/plain'], '42');
      assert.ok(typesOf(messages).indexOf('display_data') < typesOf(messages).indexOf('execute_result'));
      assert.deepEqual(statuses.slice(-2), ['busy', 'idle']);
      const failed = await run(kernel, '1 / 0');
      assert.equal(failed.reply.content.ename, 'ZeroDivisionError');
      assert.ok(typesOf(failed.messages).includes('error'));
    });
  },

  async many_outputs() {
    await withKernel(async kernel => {
      const { messages } = await run(kernel, 'for i in range(5000): print(i, flush=True)');
      assert.equal(textOf(messages), Array.from({ length: 5000 }, (_, i) => `${i}\n`).join(''));
      const shown = await run(kernel, 'for i in range(2000): display(i)');
      const values = shown.messages
        .filter(message => message.header.msg_type === 'display_data')
        .map(message => Number(message.content.data['text/plain']));
      assert.deepEqual(values, Array.from({ length: 2000 }, (_, i) => i));
    });
  },

  async large_messages() {
    await withKernel(async kernel => {
      const { messages } = await run(kernel, 'display({"text/plain": "x" * 12_000_000}, raw=True)');
      const shown = messages.find(message => message.header.msg_type === 'display_data');
      assert.equal(shown.content.data['text/plain'].length, 12_000_000);
      await run(kernel, ECHO);
      const comm = kernel.createComm('echo');
      const answers = [];
      comm.onMsg = message => {
        answers.push(message);
      };
      await within(comm.open({}).done, 'comm_open');
      const large = new Uint8Array(12_000_000).fill(7);
      await within(comm.send({}, {}, [large.buffer]).done, 'comm_msg');
      await until(() => answers.length > 0, 'the answer');
      assert.equal(answers[0].buffers[0].byteLength, large.length);
    });
  },

  async input() {
    await withKernel(async kernel => {
      const asked = [];
      const onStdin = (future, message) => {
        asked.push([message.content.prompt, message.content.password]);
        kernel.sendInputReply({ status: 'ok', value: `answer ${asked.length}` }, message.header);
      };
      const { messages } = await run(
        kernel,
        'import getpass\nfirst = input("name? ")\nprint(first, getpass.getpass("secret? "))',
        { onStdin }
      );
      assert.deepEqual(asked, [['name? ', false], ['secret? ', true]]);
      assert.equal(textOf(messages), 'answer 1 answer 2\n');
    });
  },

  async introspection() {
    await withKernel(async kernel => {
      await run(kernel, 'some_long_name = {"a": 1}');
      const completed = await kernel.requestComplete({ code: 'some_lo', cursor_pos: 7 });
      assert.ok(completed.content.matches.includes('some_long_name'));
      const inspected = await kernel.requestInspect({ code: 'len', cursor_pos: 3, detail_level: 0 });
      assert.ok(inspected.content.found);
      assert.match(inspected.content.data['text/plain'], /number of items/);
      const whole = await kernel.requestIsComplete({ code: 'if 1:' });
      assert.equal(whole.content.status, 'incomplete');
      const past = await kernel.requestHistory({ hist_access_type: 'tail', n: 1, output: false, raw: true });
      assert.equal(past.content.history.at(-1)[2], 'some_long_name = {"a": 1}');
      const comms = await kernel.requestCommInfo({});
      assert.equal(comms.content.status, 'ok');
    });
  },

  async comms_with_buffers() {
    await withKernel(async kernel => {
      await run(kernel, ECHO);
      const comm = kernel.createComm('echo');
      const answers = [];
      comm.onMsg = message => {
        answers.push(message);
      };
      await within(comm.open({}).done, 'comm_open');
      const first = Uint8Array.from({ length: 300_000 }, (_, i) => i % 251);
      const second = new Uint8Array([0, 255, 10]);
      await within(comm.send({}, {}, [first.buffer, second.buffer]).done, 'comm_msg');
      await until(() => answers.length > 0, 'the answer');
      assert.equal(answers[0].content.data.count, 2);
      const bytes = answers[0].buffers.map(one => Buffer.from(one.buffer ?? one, one.byteOffset, one.byteLength));
      assert.deepEqual(bytes, [Buffer.from(first).reverse(), Buffer.from(second).reverse()]);
      // What a kernel opens by itself comes to the target that the page has registered.
      const opened = new Promise(resolve =>
        kernel.registerCommTarget('page', (it, message) => resolve(message.content.data))
      );
      await run(kernel, 'from comm import create_comm\nc = create_comm(target_name="page", data={"x": 1})');
      assert.deepEqual(await within(opened, 'comm_open from the kernel'), { x: 1 });
    });
  },

  async display_updates() {
    await withKernel(async kernel => {
      const code = 'h = display("one", display_id="d")\nh.update("two")\nfrom IPython.display import clear_output\nclear_output(wait=True)';
      const { messages } = await run(kernel, code);
      const update = messages.find(message => message.header.msg_type === 'update_display_data');
      assert.equal(update.content.transient.display_id, 'd');
      assert.equal(update.content.data['text/plain'], "'two'");
      const clear = messages.find(message => message.header.msg_type === 'clear_output');
      assert.equal(clear.content.wait, true);
    });
  },

  async interrupt() {
    await withKernel(async kernel => {
      const future = kernel.requestExecute({ code: 'import time\nprint("on", flush=True)\ntime.sleep(600)' });
      let on = false;
      future.onIOPub = message => {
        on ||= message.header.msg_type === 'stream';
      };
      await until(() => on, 'the cell runs');
      await kernel.interrupt();
      const reply = await within(future.done, 'the interrupted cell');
      assert.equal(reply.content.ename, 'KeyboardInterrupt');
      assert.equal(textOf((await run(kernel, 'print("lives")')).messages), 'lives\n');
    });
  },

  async debugger() {
    await withKernel(async kernel => {
      const info = await kernel.info;
      assert.ok(info.debugger || info.supported_features.includes('debugger'));
      const ask = async (command, args = {}) => {
        const request = { seq: 1, type: 'request', command, arguments: args };
        const reply = await within(kernel.requestDebug(request).done, command);
        assert.equal(reply.content.success, true, JSON.stringify(reply.content));
        return reply.content.body;
      };
      assert.equal((await ask('debugInfo')).isStarted, false);
      const names = { clientID: 'check', clientName: 'check', adapterID: '', pathFormat: 'path', locale: 'en' };
      const flags = { linesStartAt1: true, columnsStartAt1: true, supportsVariableType: true };
      await ask('initialize', { ...names, ...flags, supportsVariablePaging: true, supportsRunInTerminalRequest: true });
      await ask('attach');
      const code = 'a = 1\nb = a + 1\nprint(b)';
      const { sourcePath } = await ask('dumpCell', { code });
      const breakpoints = [{ line: 2 }];
      await ask('setBreakpoints', { breakpoints, source: { path: sourcePath }, sourceModified: false });
      await ask('configurationDone');
      const stopped = new Promise(resolve =>
        kernel.iopubMessage.connect((_, message) => {
          if (message.header.msg_type === 'debug_event' && message.content.event === 'stopped') resolve(message.content);
        })
      );
      const future = kernel.requestExecute({ code });
      const event = await within(stopped, 'the breakpoint');
      const { stackFrames } = await ask('stackTrace', { threadId: event.body.threadId });
      assert.equal(stackFrames[0].line, 2);
      await ask('continue', { threadId: event.body.threadId });
      assert.equal((await within(future.done, 'the cell')).content.status, 'ok');
      await ask('disconnect', { restart: false, terminateDebuggee: true });
    });
  },

  async subshells() {
    await withKernel(async kernel => {
      assert.ok(kernel.supportsSubshells);
      const main = kernel.requestExecute({ code: 'import time\nready = True\ntime.sleep(3)' });
      const created = await within(kernel.requestCreateSubshell({}).done, 'create_subshell_request');
      const id = created.content.subshell_id;
      const listed = await within(kernel.requestListSubshell({}).done, 'list_subshell_request');
      assert.deepEqual(listed.content.subshell_id, [id]);
      const connection = manager.connectTo({ model: kernel.model });
      connection.subshellId = id;
      let mainIsDone = false;
      const done = main.done.then(() => {
        mainIsDone = true;
      });
      await within(connection.info, 'kernel_info_reply of the second connection');
      const { messages } = await run(connection, 'print("aside")');
      assert.equal(textOf(messages), 'aside\n');
      assert.equal(mainIsDone, false);
      connection.dispose();
      await within(kernel.requestDeleteSubshell({ subshell_id: id }).done, 'delete_subshell_request');
      await within(done, 'the cell of the main shell');
    });
  },

  async two_clients() {
    await withKernel(async kernel => {
      const other = manager.connectTo({ model: kernel.model });
      await within(other.info, 'kernel_info_reply of the second client');
      const seen = [];
      other.anyMessage.connect((_, { msg, direction }) => {
        if (direction === 'recv') seen.push(msg);
      });
      const { reply } = await run(kernel, 'print("for both")');
      await until(() => textOf(seen) === 'for both\n', 'the outputs at the second client');
      assert.ok(!seen.some(message => message.parent_header.msg_id === reply.parent_header.msg_id && message.channel === 'shell'));
      const mine = await run(other, 'print("mine")');
      assert.equal(textOf(mine.messages), 'mine\n');
      other.dispose();
    });
  },

  async restart() {
    await withKernel(async kernel => {
      await run(kernel, 'x = 1');
      const { id } = kernel;
      const statuses = [];
      kernel.statusChanged.connect((_, status) => statuses.push(status));
      await within(kernel.restart(), 'the restart');
      await within(kernel.info, 'kernel_info_reply after the restart');
      assert.equal(kernel.id, id);
      const { reply } = await run(kernel, 'x');
      assert.equal(reply.content.ename, 'NameError');
      assert.equal(reply.content.execution_count, 1);
      assert.ok(!statuses.includes('autorestarting') && !statuses.includes('dead'), statuses.join());
    });
  },

  async cut_connection() {
    await withKernel(async kernel => {
      const code = 'import time\nfor i in range(30):\n    print(i, flush=True)\n    time.sleep(0.1)\n"end"';
      const future = kernel.requestExecute({ code });
      const messages = [];
      const cutAfter = [5, 15, 25];
      let cuts = 0;
      kernel.connectionStatusChanged.connect((_, status) => {
        cuts += status !== 'connected';
      });
      future.onIOPub = message => {
        messages.push(message);
        // Lines may come together.
        if (textOf([message]).split('\n').some(line => line !== '' && Number(line) >= cutAfter[0])) {
          cutAfter.shift();
          kernel._ws.terminate();
        }
      };
      await until(() => cuts > 0, 'the cut');
      const reply = await within(future.done, 'the cell of a cut connection');
      assert.equal(reply.content.status, 'ok');
      // At least once: what was in doubt when the connection was cut may come twice.
      const lines = textOf(messages).trim().split('\n').map(Number);
      assert.deepEqual([...new Set(lines)], Array.from({ length: 30 }, (_, i) => i));
      assert.ok(lines.length < 40, lines.join());
      assert.ok(typesOf(messages).includes('execute_result'));
    });
  },

  async death() {
    await withKernel(async kernel => {
      const statuses = [];
      kernel.statusChanged.connect((_, status) => statuses.push(status));
      const { messages, reply } = await run(kernel, 'print("so far", flush=True)\nimport os; os._exit(7)');
      assert.equal(reply.content.status, 'error');
      assert.match(reply.content.evalue, /exit code 7/);
      assert.match(textOf(messages), /so far/);
      assert.match(textOf(messages, 'stderr'), /exit code 7/);
      await until(() => statuses.includes('autorestarting'), 'the automatic restart');
      await until(() => kernel.status === 'idle', 'the new kernel');
      assert.equal(textOf((await run(kernel, 'print("again")')).messages), 'again\n');
    });
  },

  async shutdown() {
    const kernel = await within(manager.startNew({ name: kernelName }), 'a kernel');
    await within(kernel.info, 'kernel_info_reply');
    const { id } = kernel;
    const watching = manager.connectTo({ model: kernel.model });
    await within(watching.info, 'kernel_info_reply');
    assert.ok((await KernelAPI.listRunning(serverSettings)).some(model => model.id === id));
    await within(kernel.shutdown(), 'the shutdown');
    assert.ok(!(await KernelAPI.listRunning(serverSettings)).some(model => model.id === id));
    assert.equal(await KernelAPI.getKernelModel(id, serverSettings), undefined);
    await until(() => watching.status === 'dead' || watching.isDisposed, 'the other client hears of it');
  },

  async sessions() {
    const kernelManager = new KernelManager({ serverSettings });
    const sessions = new SessionManager({ serverSettings, kernelManager });
    await within(sessions.ready, 'the list of sessions');
    const options = { path: 'one.ipynb', name: 'one', type: 'notebook', kernel: { name: kernelName } };
    const session = await within(sessions.startNew(options), 'a session');
    try {
      await within(session.kernel.info, 'kernel_info_reply');
      const again = await SessionAPI.startSession(options, serverSettings);
      assert.equal(again.id, session.id);
      assert.equal(again.kernel.id, session.kernel.id);
      await session.setPath('two.ipynb');
      await session.setName('two');
      await session.setType('console');
      const model = await SessionAPI.getSessionModel(session.id, serverSettings);
      assert.deepEqual([model.path, model.name, model.type], ['two.ipynb', 'two', 'console']);
      const before = session.kernel.id;
      const changed = await within(session.changeKernel({ name: kernelName }), 'another kernel');
      await within(changed.info, 'kernel_info_reply');
      assert.notEqual(session.kernel.id, before);
      assert.equal(textOf((await run(session.kernel, 'print(1)')).messages), '1\n');
      const listed = await SessionAPI.listRunning(serverSettings);
      assert.deepEqual(listed.map(one => one.id), [session.id]);
    } finally {
      await within(session.shutdown(), 'the end of the session');
    }
    assert.deepEqual(await SessionAPI.listRunning(serverSettings), []);
    sessions.dispose();
    kernelManager.dispose();
  }
};

let failures = 0;
let current = '';
process.on('unhandledRejection', reason => {
  // The library makes subshells for comms in the background, and rejects them when the kernel goes.
  if (/Canceled future/.test(String(reason))) return;
  failures += 1;
  console.log(JSON.stringify({ name: current, ok: false, error: `unhandled rejection: ${reason?.stack ?? reason}` }));
});
for (const [name, check] of Object.entries(checks)) {
  if (selected.length && !selected.includes(name)) continue;
  const began = Date.now();
  current = name;
  try {
    await check();
    console.log(JSON.stringify({ name, ok: true, ms: Date.now() - began }));
  } catch (error) {
    failures += 1;
    console.log(JSON.stringify({ name, ok: false, ms: Date.now() - began, error: String(error.stack ?? error) }));
  }
}
process.exit(failures ? 1 : 0);
