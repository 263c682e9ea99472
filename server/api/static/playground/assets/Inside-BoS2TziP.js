import{a as r,f as t}from"./index-C4Od5-EE.js";var e=t("<h1>Look inside</h1>");function i(o){var a=e();r(o,a)}export{i as default};
